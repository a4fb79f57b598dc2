_base_ = './rtmdet_fasternet-t0_8xb32-300e_coco.py'
checkpoint = _base_.imagenet.t2
model = dict(
    backbone=dict(
        arch='t2',
        drop_path_rate=0.05,
        init_cfg=dict(checkpoint=checkpoint),
    ),
    neck=dict(in_channels=[192, 384, 768], out_channels=96),
    bbox_head=dict(in_channels=96, feat_channels=96),
)
