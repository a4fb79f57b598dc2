# Mask R-CNN with GhostNet, from scratch.
_base_ = './mask-rcnn_fasternet-t0_fpn_nuclei.py'
model = dict(
    backbone=dict(_delete_=True, type='GhostNet'),
    neck=dict(in_channels=[24, 40, 112, 160]),
)
