_base_ = './retinanet_fasternet-t0_fpn_1x_coco.py'
model = dict(
    backbone=dict(
        arch='s',
        drop_path_rate=0.15,
        init_cfg=dict(checkpoint=_base_.imagenet.s),
    ),
    neck=dict(in_channels=[256, 512, 1024]),
)
