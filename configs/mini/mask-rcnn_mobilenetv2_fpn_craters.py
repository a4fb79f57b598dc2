# Mask R-CNN with MobileNetV2 on craters, from scratch.
_base_ = './mask-rcnn_fasternet-t0_fpn_craters.py'
model = dict(
    backbone=dict(_delete_=True, type='MobileNetV2'),
    neck=dict(in_channels=[24, 32, 96, 1280]),
)
