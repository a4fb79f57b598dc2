# The root of the Mask R-CNN family. The published recipe, for S, M and L:
# AdamW without gradient clipping, nothing frozen, BatchNorm in train mode.
# T0 to T2, which have no published detection runs, take S's learning rate
# and the drop path of their ImageNet training.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    'mmdet::_base_/schedules/schedule_1x.py',
    'mmdet::_base_/default_runtime.py',
    './fasternet.py',
]
model = dict(
    backbone=dict(
        _delete_=True,
        type='FasterNet',
        arch='t0',
        init_cfg=dict(type='Pretrained', checkpoint=_base_.imagenet.t0),
    ),
    neck=dict(in_channels=[40, 80, 160, 320]),
)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=2e-4, weight_decay=1e-4)
)
