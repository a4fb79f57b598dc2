# RTMDet with GhostNet on HeLa cells' nuclei, from scratch.
_base_ = './rtmdet_fasternet-t0_hela.py'
model = dict(
    backbone=dict(_delete_=True, type='GhostNet', out_indices=(4, 6, 8)),
    neck=dict(in_channels=[40, 112, 160]),
)
