_base_ = './retinanet_fasternet-t0_fpn_1x_coco.py'
model = dict(
    backbone=dict(
        arch='t1',
        drop_path_rate=0.02,
        init_cfg=dict(checkpoint=_base_.imagenet.t1),
    ),
    neck=dict(in_channels=[128, 256, 512]),
)
