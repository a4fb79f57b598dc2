# The root of the RetinaNet family. The optimizer is that of mmdet's RetinaNet
# with PVT and of PoolFormer's, backbones of this size: AdamW, 1e-4 and 1e-4
# (mmdet: configs/pvt/retinanet_pvt-t_fpn_1x_coco.py).
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    'mmdet::_base_/datasets/coco_detection.py',
    'mmdet::_base_/schedules/schedule_1x.py',
    'mmdet::_base_/default_runtime.py',
    './fasternet.py',
]
model = dict(
    backbone=dict(
        _delete_=True,
        type='FasterNet',
        arch='t0',
        out_indices=(2, 4, 6),  # an output norm that no level reads breaks DDP
        init_cfg=dict(type='Pretrained', checkpoint=_base_.imagenet.t0),
    ),
    neck=dict(in_channels=[80, 160, 320], start_level=0),
)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, weight_decay=1e-4)
)
