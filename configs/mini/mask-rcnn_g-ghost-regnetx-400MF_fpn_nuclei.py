# Mask R-CNN with G-Ghost RegNetX-400MF, from scratch.
_base_ = './mask-rcnn_fasternet-t0_fpn_nuclei.py'
model = dict(
    backbone=dict(
        _delete_=True, type='GGhostRegNet', arch='004', norm_eval=False
    ),
    neck=dict(in_channels=[32, 64, 160, 384]),
)
