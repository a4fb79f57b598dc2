# The RTMDet of FasterNet-T0, recipe included, with GhostNet.
_base_ = [
    '../fasternet/rtmdet_fasternet-t0_8xb32-300e_coco.py',
    './ghostnet.py',
]
checkpoint = _base_.ghostnet
model = dict(
    backbone=dict(
        _delete_=True,
        type='GhostNet',
        out_indices=(4, 6, 8),
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    neck=dict(in_channels=[40, 112, 160]),
)
