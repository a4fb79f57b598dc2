_base_ = './upernet_fasternet-t2_8xb2-160k_ade20k-512x512.py'
model = dict(
    backbone=dict(
        arch='s',
        drop_path_rate=0.15,
        init_cfg=dict(checkpoint=_base_.imagenet.s),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
