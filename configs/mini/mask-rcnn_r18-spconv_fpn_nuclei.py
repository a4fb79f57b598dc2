# Mask R-CNN with ResNet-18, its 3x3 convolutions SPConv, from scratch.
_base_ = './mask-rcnn_r18_fpn_nuclei.py'
model = dict(
    backbone=dict(
        dcn=dict(type='SPConv', alpha=0.5),
        stage_with_dcn=(True, True, True, True),
    )
)
