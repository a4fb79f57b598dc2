# The root of the ImageNet family: the authors' recipe. The backbone is all of
# the classifier, with the original's names, so that detectors load what is
# trained here.
_base_ = 'mmpretrain::_base_/default_runtime.py'
custom_imports = dict(imports=['fasternet_det'], allow_failed_imports=False)

model = dict(
    type='ImageClassifier',
    backbone=dict(type='mmdet.FasterNet', arch='t0', fork_feat=False),
    # Heads of mmpretrain take the last of several outputs, so logits
    # (N, 1000) go in as the only one, (1, N, 1000).
    neck=dict(type='torch.nn.Unflatten', dim=0, unflattened_size=(1, -1)),
    head=dict(
        type='ClsHead',
        loss=dict(
            type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'
        ),
    ),
    train_cfg=dict(
        augments=[
            dict(type='Mixup', alpha=0.05),
            dict(type='CutMix', alpha=1.0),
        ]
    ),
)
data_preprocessor = dict(
    num_classes=1000,
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    to_rgb=True,
)

bicubic = dict(backend='pillow', interpolation='bicubic')
train_192, train_224 = (
    [
        dict(type='LoadImageFromFile'),
        dict(type='RandomResizedCrop', scale=size, **bicubic),
        dict(type='RandomFlip', prob=0.5, direction='horizontal'),
        dict(type='PackInputs'),
    ]
    for size in (192, 224)
)
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=248, edge='short', **bicubic),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackInputs'),
]
train_dataloader = dict(
    batch_size=512,
    num_workers=8,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='ImageNet',
        data_root='data/imagenet',
        split='train',
        pipeline=train_192,
    ),
)
val_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    collate_fn=dict(type='default_collate'),
    dataset=dict(
        type='ImageNet',
        data_root='data/imagenet',
        split='val',
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='Accuracy', topk=(1, 5))
test_evaluator = val_evaluator

train_cfg = dict(by_epoch=True, max_epochs=300, val_interval=1)
val_cfg = dict()
test_cfg = dict()
custom_hooks = [
    dict(
        type='SwitchRecipeHook',
        schedule=[dict(action_epoch=281, train_pipeline=train_224)],
    )
]
# For 4096 images a step. All parameters decay, norms and biases too.
auto_scale_lr = dict(enable=False, base_batch_size=4096)
optim_wrapper = dict(
    optimizer=dict(type='AdamW', lr=0.004, weight_decay=0.005)
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6 / 0.004, end=20),
    dict(type='CosineAnnealingLR', eta_min=1e-5, begin=20, end=300),
]
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3, save_best='auto'))
