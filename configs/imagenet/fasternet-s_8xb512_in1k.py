_base_ = './fasternet-t0_8xb512_in1k.py'
model = dict(
    backbone=dict(arch='s', drop_path_rate=0.1),
    train_cfg=dict(
        augments=[
            dict(type='Mixup', alpha=0.3),
            dict(type='CutMix', alpha=1.0),
        ]
    ),
)
rand_augment = dict(
    type='RandAugment',
    policies='timm_increasing',
    num_policies=2,
    total_level=10,
    magnitude_level=7,
    magnitude_std=0.5,
    hparams=dict(pad_val=[104, 116, 124], interpolation='bicubic'),
)
train_192, train_224 = (
    [*pipeline[:-1], rand_augment, pipeline[-1]]
    for pipeline in (_base_.train_192, _base_.train_224)
)
train_dataloader = dict(dataset=dict(pipeline=train_192))
custom_hooks = [
    dict(
        type='SwitchRecipeHook',
        schedule=[dict(action_epoch=281, train_pipeline=train_224)],
    )
]
optim_wrapper = dict(optimizer=dict(weight_decay=0.03))
