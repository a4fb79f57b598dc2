# RTMDet with ResNet-18 on craters, from scratch.
_base_ = './rtmdet_fasternet-t0_craters.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='SlotResNet',
        depth=18,
        norm_eval=False,
        out_indices=(1, 2, 3),
    ),
    neck=dict(in_channels=[128, 256, 512]),
)
