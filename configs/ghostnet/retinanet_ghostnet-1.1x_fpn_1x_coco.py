# The paper's width for COCO, of which no ImageNet file is published: name your
# own in init_cfg. Without, all of it trains from scratch.
_base_ = './retinanet_ghostnet-1.0x_fpn_1x_coco.py'
model = dict(
    backbone=dict(width=1.1, frozen_stages=-1, norm_eval=False, init_cfg=None),
    neck=dict(in_channels=[44, 124, 176]),
)
sync_bn = 'torch'  # on several GPUs, statistics over all of them
