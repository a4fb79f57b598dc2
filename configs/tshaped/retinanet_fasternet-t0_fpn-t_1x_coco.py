# FasterNet-T0's RetinaNet, the 3x3 convolutions of its neck and towers
# T-shaped.
_base_ = '../fasternet/retinanet_fasternet-t0_fpn_1x_coco.py'
conv_cfg = dict(type='TShapedConv')
model = dict(
    neck=dict(conv_cfg=conv_cfg),
    bbox_head=dict(
        conv_cfg=conv_cfg,
        # mmdet's 0.01 keeps the spread of a 3x3 convolution's output, which
        # has nine weights where this has one.
        init_cfg=dict(
            type='Normal',
            layer='Conv2d',
            std=0.03,
            override=dict(
                type='Normal', name='retina_cls', std=0.01, bias_prob=0.01
            ),
        ),
    ),
)
