# Mask R-CNN with GhostNet on HeLa cells' nuclei, from scratch.
_base_ = './mask-rcnn_fasternet-t0_fpn_hela.py'
model = dict(
    backbone=dict(_delete_=True, type='GhostNet'),
    neck=dict(in_channels=[24, 40, 112, 160]),
)
