_base_ = './retinanet_g-ghost-regnetx-3.2GF_fpn_1x_coco.py'
model = dict(
    backbone=dict(
        arch='040', init_cfg=dict(checkpoint=_base_.imagenet['040'])
    ),
    neck=dict(in_channels=[80, 240, 560, 1360]),
)
