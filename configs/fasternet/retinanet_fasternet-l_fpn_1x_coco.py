_base_ = './retinanet_fasternet-t0_fpn_1x_coco.py'
model = dict(
    backbone=dict(
        arch='l',
        drop_path_rate=0.3,
        init_cfg=dict(checkpoint=_base_.imagenet.l),
    ),
    neck=dict(in_channels=[384, 768, 1536]),
)
