# RTMDet with FasterNet-T0 on craters, from scratch. Made by:
# python -m fasternet_det.datasets.craters data/craters
_base_ = './rtmdet_fasternet-t0_nuclei.py'
data_root = 'data/craters/'
metainfo = dict(classes=('crater',), palette=[(220, 20, 60)])
model = dict(data_preprocessor=dict(mean=[151.0] * 3, std=[78.0] * 3))
train_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo))
val_dataloader = dict(dataset=dict(data_root=data_root, metainfo=metainfo))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/val.json')
test_evaluator = val_evaluator
train_cfg = dict(val_interval=400)
