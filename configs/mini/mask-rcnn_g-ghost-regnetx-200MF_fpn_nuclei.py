# Mask R-CNN with G-Ghost RegNetX-200MF, from scratch.
_base_ = './mask-rcnn_fasternet-t0_fpn_nuclei.py'
model = dict(
    backbone=dict(
        _delete_=True, type='GGhostRegNet', arch='002', norm_eval=False
    ),
    neck=dict(in_channels=[24, 56, 152, 368]),
)
