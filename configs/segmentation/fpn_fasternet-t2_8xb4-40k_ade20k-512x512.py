# The root of the Semantic FPN family. The schedule is that of mmseg's
# Semantic FPN with PoolFormer, a backbone of this size: AdamW, 2e-4 and 1e-4,
# 40k iterations of 32 images (mmseg: configs/poolformer).
_base_ = [
    'mmseg::_base_/models/fpn_r50.py',
    'mmseg::_base_/datasets/ade20k.py',
    'mmseg::_base_/schedules/schedule_40k.py',
    'mmseg::_base_/default_runtime.py',
    '../fasternet/fasternet.py',
]
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    pretrained=None,  # the ResNet's
    backbone=dict(
        _delete_=True,
        type='mmdet.FasterNet',
        arch='t2',
        drop_path_rate=0.05,
        init_cfg=dict(type='Pretrained', checkpoint=_base_.imagenet.t2),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
    decode_head=dict(num_classes=150),
)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=2e-4, weight_decay=1e-4)
)
param_scheduler = [
    dict(type='PolyLR', power=0.9, eta_min=0, end=40000, by_epoch=False)
]
auto_scale_lr = dict(enable=False, base_batch_size=32)
