_base_ = './fpn_fasternet-t2_8xb4-40k_ade20k-512x512.py'
model = dict(
    backbone=dict(
        arch='s',
        drop_path_rate=0.15,
        init_cfg=dict(checkpoint=_base_.imagenet.s),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
