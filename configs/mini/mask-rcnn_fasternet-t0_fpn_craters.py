# Mask R-CNN with FasterNet-T0 on craters, from scratch. Made by:
# python -m fasternet_det.datasets.craters data/craters
_base_ = './mask-rcnn_fasternet-t0_fpn_nuclei.py'
data_root = 'data/craters/'
metainfo = dict(classes=('crater',), palette=[(220, 20, 60)])
model = dict(
    data_preprocessor=dict(mean=[151.0] * 3, std=[78.0] * 3),
    # 16 to 128 of the resized image's pixels, where nuclei take 24 to 192:
    # most craters are smaller.
    rpn_head=dict(anchor_generator=dict(scales=[4])),
)
train_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo))
val_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo))
test_dataloader = val_dataloader
# Masks are discs, as annotated: they train, but say no more than boxes.
val_evaluator = dict(
    ann_file=data_root + 'annotations/val.json', metric='bbox'
)
test_evaluator = val_evaluator

# They are harder to learn than nuclei: twice the iterations.
train_cfg = dict(max_iters=240, val_interval=240)
param_scheduler = _base_.param_scheduler
param_scheduler[1].end = 240
