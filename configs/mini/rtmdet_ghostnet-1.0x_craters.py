# RTMDet with GhostNet on craters, from scratch.
_base_ = './rtmdet_fasternet-t0_craters.py'
model = dict(
    backbone=dict(_delete_=True, type='GhostNet', out_indices=(4, 6, 8)),
    neck=dict(in_channels=[40, 112, 160]),
)
