_base_ = './mask-rcnn_g-ghost-regnetx-3.2GF_fpn_1x_coco.py'
model = dict(
    backbone=dict(
        arch='080', init_cfg=dict(checkpoint=_base_.imagenet['080'])
    ),
    neck=dict(in_channels=[80, 240, 720, 1920]),
)
