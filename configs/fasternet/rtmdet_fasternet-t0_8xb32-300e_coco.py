# The root of the RTMDet family, whose necks and heads suit tiny backbones:
# mmdet's RTMDet-tiny, recipe included, with a neck of fewer operators, and
# images normalised for the backbone's ImageNet weights.
_base_ = [
    'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
    './fasternet.py',
]
checkpoint = _base_.imagenet.t0
model = dict(
    data_preprocessor=dict(
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        # PAFPN rounds halves up, the backbone down.
        pad_size_divisor=32,
    ),
    backbone=dict(
        _delete_=True,
        type='FasterNet',
        arch='t0',
        out_indices=(2, 4, 6),
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
    ),
    neck=dict(
        _delete_=True,
        type='PAFPN',
        in_channels=[80, 160, 320],
        out_channels=80,
        num_outs=3,
        norm_cfg=dict(type='SyncBN'),
        act_cfg=dict(type='SiLU', inplace=True),
    ),
    bbox_head=dict(in_channels=80, feat_channels=80),
    # What our RetinaNet lets into NMS and keeps: RTMDet's own thresholds, made
    # for the last bit of AP, let in up to 30000 boxes per level.
    test_cfg=dict(nms_pre=1000, score_thr=0.05, max_per_img=100),
)
auto_scale_lr = dict(base_batch_size=256)  # mmdet's RTMDet leaves it at 16
