# RTMDet with MobileNetV2 on HeLa cells' nuclei, from scratch.
_base_ = './rtmdet_fasternet-t0_hela.py'
model = dict(
    backbone=dict(_delete_=True, type='MobileNetV2', out_indices=(2, 4, 7)),
    neck=dict(in_channels=[32, 96, 1280]),
)
