# RetinaNet with ResNet-50, the 3x3 convolutions of its stages SPConv. Of these
# no ImageNet weights are published: they start at random, the others from
# torchvision's, so that just the stem is frozen, and BatchNorm trains, over
# all GPUs.
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['fasternet_det'], allow_failed_imports=False)
model = dict(
    backbone=dict(
        frozen_stages=0,
        norm_eval=False,
        dcn=dict(type='SPConv', alpha=0.5),
        stage_with_dcn=(True, True, True, True),
    )
)
sync_bn = 'torch'
