# Mask R-CNN with FasterNet-T0, the 3x3 convolutions of its neck and heads
# T-shaped, from scratch.
_base_ = './mask-rcnn_fasternet-t0_fpn_nuclei.py'
conv_cfg = dict(type='TShapedConv')
model = dict(
    neck=dict(conv_cfg=conv_cfg),
    rpn_head=dict(type='SlotRPNHead', conv_cfg=conv_cfg),
    roi_head=dict(mask_head=dict(conv_cfg=conv_cfg)),
)
