# Mask R-CNN with FasterNet-T0, from scratch, for two CPU cores.
_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py', './nuclei.py']
norm_cfg = dict(type='BN')
model = dict(
    data_preprocessor=_base_.normalize,
    backbone=dict(_delete_=True, type='FasterNet', arch='t0'),
    neck=dict(
        in_channels=[40, 80, 160, 320],
        out_channels=96,
        norm_cfg=norm_cfg,
        num_outs=4,
    ),
    rpn_head=dict(
        in_channels=96,
        feat_channels=96,
        anchor_generator=dict(scales=[6], strides=[4, 8, 16, 32]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(
            out_channels=96, roi_layer=dict(sampling_ratio=2)
        ),
        bbox_head=dict(in_channels=96, fc_out_channels=256, num_classes=1),
        mask_roi_extractor=dict(
            out_channels=96, roi_layer=dict(sampling_ratio=2)
        ),
        mask_head=dict(
            in_channels=96, conv_out_channels=96, num_convs=2, num_classes=1
        ),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=200),
        rcnn=dict(sampler=dict(num=64)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=200)),
)
