# Cascade R-CNN with ResNet-50, the 3x3 convolutions of its stages 2 to 4
# SAConv, all others ConvAWS2d: DetectoRS without its recursive pyramid, and
# without compiled ops in the backbone. With use_deform=True, it is mmdet's.
_base_ = 'mmdet::detectors/cascade-rcnn_r50-sac_1x_coco.py'
custom_imports = dict(imports=['fasternet_det'], allow_failed_imports=False)
model = dict(
    backbone=dict(
        conv_cfg=dict(type='ConvAWS2d'),
        sac=dict(type='SAConv', use_deform=False),
    )
)
