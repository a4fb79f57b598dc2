# Nucleus or background, of each pixel of the micrograph that fasternet_det
# ships: 128-pixel tiles, shown to the model at 256 pixels; all weights start
# at random. Made by: python -m fasternet_det.datasets.nuclei data/nuclei
_base_ = [
    'mmseg::_base_/models/fpn_r50.py',
    'mmseg::_base_/schedules/schedule_40k.py',
    'mmseg::_base_/default_runtime.py',
]
custom_imports = dict(imports=['fasternet_det'], allow_failed_imports=False)

model = dict(
    data_preprocessor=dict(
        size=(256, 256),
        mean=[33.0] * 3,  # of the training tiles
        std=[24.0] * 3,
    ),
    pretrained=None,  # the ResNet's
    backbone=dict(_delete_=True, type='mmdet.FasterNet', arch='t0'),
    # of the backbone's own size: ADE20K's would cost ten times as much
    neck=dict(in_channels=[40, 80, 160, 320], out_channels=64),
    decode_head=dict(
        in_channels=[64] * 4,
        channels=64,
        num_classes=2,
        norm_cfg=dict(type='BN'),
    ),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(
        type='RandomResize',
        scale=(256, 256),
        ratio_range=(1.0, 1.5),
        keep_ratio=True,
    ),
    dict(type='RandomCrop', crop_size=(256, 256)),
    dict(
        type='RandomFlip',
        prob=[0.25, 0.25, 0.25],
        direction=['horizontal', 'vertical', 'diagonal'],
    ),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(256, 256), keep_ratio=True),
    dict(type='LoadAnnotations'),  # the truth keeps its size
    dict(type='PackSegInputs'),
]
dataset = dict(
    type='BaseSegDataset',
    data_root='data/nuclei/',
    img_suffix='.png',
    metainfo=dict(
        classes=('background', 'nucleus'), palette=[(0, 0, 0), (220, 20, 60)]
    ),
)
train_dataloader = dict(
    batch_size=8,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path='train', seg_map_path='annotations/train'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path='val', seg_map_path='annotations/val'),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator

# 60 iterations suit two CPU cores.
train_cfg = dict(max_iters=60, val_interval=20)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=2e-3, weight_decay=1e-4)
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, end=10, by_epoch=False),
    dict(type='PolyLR', power=0.9, begin=10, end=60, by_epoch=False),
]
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(interval=20, max_keep_ckpts=1),
)
randomness = dict(seed=0)
