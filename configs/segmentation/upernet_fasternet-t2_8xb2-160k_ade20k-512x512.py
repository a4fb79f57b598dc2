# The root of the UPerNet family. The schedule is that of mmseg's UPerNet with
# Swin: AdamW, 6e-5 and 0.01, 160k iterations of 16 images, of which 1500 warm
# up (mmseg: configs/swin).
_base_ = [
    'mmseg::_base_/models/upernet_r50.py',
    'mmseg::_base_/datasets/ade20k.py',
    'mmseg::_base_/schedules/schedule_160k.py',
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
    decode_head=dict(in_channels=[96, 192, 384, 768], num_classes=150),
    auxiliary_head=dict(in_channels=384, num_classes=150),
)
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=6e-5, weight_decay=0.01),
    paramwise_cfg=dict(norm_decay_mult=0.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, end=1500, by_epoch=False),
    dict(
        type='PolyLR',
        power=1.0,
        eta_min=0,
        begin=1500,
        end=160000,
        by_epoch=False,
    ),
]
auto_scale_lr = dict(enable=False, base_batch_size=16)
