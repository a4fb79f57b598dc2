# The root of the RetinaNet family. The recipe is mmdet's for ResNet, as the
# paper has it, but for the images, which are normalised as for the ImageNet
# file: RGB, not BGR.
_base_ = ['mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', './ghostnet.py']
custom_imports = dict(imports=['fasternet_det'], allow_failed_imports=False)
model = dict(
    backbone=dict(
        _delete_=True,
        type='GhostNet',
        out_indices=(4, 6, 8),  # just what the neck reads
        frozen_stages=1,
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint=_base_.ghostnet),
    ),
    neck=dict(in_channels=[40, 112, 160], start_level=0),
)
