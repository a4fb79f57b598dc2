# RetinaNet with FasterNet-T0, from scratch, for two CPU cores.
_base_ = ['mmdet::_base_/models/retinanet_r50_fpn.py', './nuclei.py']
norm_cfg = dict(type='BN')
model = dict(
    data_preprocessor=_base_.normalize,
    backbone=dict(
        _delete_=True, type='FasterNet', arch='t0', out_indices=(2, 4, 6)
    ),
    neck=dict(
        in_channels=[80, 160, 320],
        start_level=0,
        out_channels=96,
        norm_cfg=norm_cfg,
        num_outs=3,
    ),
    bbox_head=dict(
        num_classes=1,
        in_channels=96,
        feat_channels=96,
        stacked_convs=2,
        norm_cfg=norm_cfg,
        anchor_generator=dict(strides=[8, 16, 32]),
        reg_decoded_bbox=True,
        loss_bbox=dict(type='GIoULoss', loss_weight=2.0),
    ),
)
val_evaluator = dict(metric='bbox')
test_evaluator = val_evaluator

# Lighter iterations than Mask R-CNN's, so more of them.
train_cfg = dict(max_iters=200)
param_scheduler = _base_.param_scheduler
param_scheduler[1].end = 200
