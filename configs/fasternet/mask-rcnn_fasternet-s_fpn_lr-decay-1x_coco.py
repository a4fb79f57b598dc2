# Each block learns at 0.9 times the rate of the one after it. Not measured:
# the rate is a start for your own.
_base_ = './mask-rcnn_fasternet-s_fpn_1x_coco.py'
optim_wrapper = dict(
    constructor='LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(layer_decay_rate=0.9),
)
