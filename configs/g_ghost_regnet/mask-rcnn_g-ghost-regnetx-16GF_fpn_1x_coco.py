_base_ = './mask-rcnn_g-ghost-regnetx-3.2GF_fpn_1x_coco.py'
model = dict(
    backbone=dict(
        arch='160', init_cfg=dict(checkpoint=_base_.imagenet['160'])
    ),
    neck=dict(in_channels=[256, 512, 896, 2048]),
)
