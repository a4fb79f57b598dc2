# RTMDet with FasterNet-T0, from scratch, for two CPU cores: the neck and head
# of configs/fasternet/rtmdet_fasternet-t0_8xb32-300e_coco.py.
_base_ = './nuclei.py'
norm_cfg = dict(type='BN')
act_cfg = dict(type='SiLU', inplace=True)
model = dict(
    type='RTMDet',
    data_preprocessor=dict(
        type='DetDataPreprocessor', pad_size_divisor=32, **_base_.normalize
    ),
    backbone=dict(type='FasterNet', arch='t0', out_indices=(2, 4, 6)),
    neck=dict(
        type='PAFPN',
        in_channels=[80, 160, 320],
        out_channels=80,
        num_outs=3,
        norm_cfg=norm_cfg,
        act_cfg=act_cfg,
    ),
    bbox_head=dict(
        type='RTMDetSepBNHead',
        num_classes=1,
        in_channels=80,
        feat_channels=80,
        stacked_convs=2,
        anchor_generator=dict(
            type='MlvlPointGenerator', offset=0, strides=[8, 16, 32]
        ),
        bbox_coder=dict(type='DistancePointBBoxCoder'),
        loss_cls=dict(type='QualityFocalLoss', beta=2.0, use_sigmoid=True),
        loss_bbox=dict(type='GIoULoss', loss_weight=2.0),
        with_objectness=False,
        exp_on_reg=True,
        norm_cfg=norm_cfg,
        act_cfg=act_cfg,
    ),
    train_cfg=dict(
        assigner=dict(type='DynamicSoftLabelAssigner', topk=13),
        allowed_border=-1,
        pos_weight=-1,
    ),
    test_cfg=dict(
        nms_pre=1000,
        min_bbox_size=0,
        score_thr=0.05,
        nms=dict(type='nms', iou_threshold=0.65),
        max_per_img=100,
    ),
)

# Its assigner would take the masks' centres, and not from what this loads.
train_pipeline = _base_.train_pipeline
train_pipeline[1].with_mask = False
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_evaluator = dict(metric='bbox')
test_evaluator = val_evaluator

# Lighter iterations than Mask R-CNN's, so more of them.
train_cfg = dict(max_iters=400)
param_scheduler = _base_.param_scheduler
param_scheduler[1].end = 400
