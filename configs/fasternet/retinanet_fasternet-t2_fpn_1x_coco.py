_base_ = './retinanet_fasternet-t0_fpn_1x_coco.py'
model = dict(
    backbone=dict(
        arch='t2',
        drop_path_rate=0.05,
        init_cfg=dict(checkpoint=_base_.imagenet.t2),
    ),
    neck=dict(in_channels=[192, 384, 768]),
)
