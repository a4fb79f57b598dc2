_base_ = './retinanet_fasternet-t0_fpn_1x_coco.py'
model = dict(
    backbone=dict(
        arch='m',
        drop_path_rate=0.2,
        init_cfg=dict(checkpoint=_base_.imagenet.m),
    ),
    neck=dict(in_channels=[288, 576, 1152]),
)
