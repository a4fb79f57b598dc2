# Mask R-CNN with ResNet-18 on craters, from scratch.
_base_ = './mask-rcnn_fasternet-t0_fpn_craters.py'
model = dict(
    backbone=dict(_delete_=True, type='SlotResNet', depth=18, norm_eval=False),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
