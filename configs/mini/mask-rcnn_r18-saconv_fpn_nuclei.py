# Mask R-CNN with ResNet-18, the 3x3 convolutions of its stages 2 to 4 SAConv,
# as in DetectoRS, from scratch.
_base_ = './mask-rcnn_r18_fpn_nuclei.py'
model = dict(
    backbone=dict(
        dcn=dict(type='SAConv'), stage_with_dcn=(False, True, True, True)
    )
)
