# RTMDet with ResNet-18 on HeLa cells' nuclei, from scratch.
_base_ = './rtmdet_fasternet-t0_hela.py'
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
