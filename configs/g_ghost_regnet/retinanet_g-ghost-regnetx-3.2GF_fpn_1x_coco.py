# The root of the RetinaNet family. The recipe is that of mmdet's RegNetX
# (configs/regnet/retinanet_regnetx-3.2GF_fpn_1x_coco.py), but for the images,
# which are normalised as in the official ImageNet training: RGB, not BGR.
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    'mmdet::_base_/datasets/coco_detection.py',
    'mmdet::_base_/schedules/schedule_1x.py',
    'mmdet::_base_/default_runtime.py',
    './g_ghost_regnet.py',
]
model = dict(
    backbone=dict(
        _delete_=True,
        type='GGhostRegNet',
        arch='032',
        frozen_stages=1,
        init_cfg=dict(type='Pretrained', checkpoint=_base_.imagenet['032']),
    ),
    neck=dict(in_channels=[96, 192, 432, 1008]),
)
optim_wrapper = dict(
    optimizer=dict(weight_decay=5e-5),
    clip_grad=dict(max_norm=35, norm_type=2),
)
