# Mask R-CNN with FasterNet-T0 on HeLa cells' nuclei, from scratch. Made by:
# python -m fasternet_det.datasets.hela data/hela
_base_ = './mask-rcnn_fasternet-t0_fpn_nuclei.py'
data_root = 'data/hela/'
model = dict(data_preprocessor=dict(mean=[46.0] * 3, std=[28.0] * 3))
train_dataloader = dict(dataset=dict(data_root=data_root))
val_dataloader = dict(dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/val.json')
test_evaluator = val_evaluator
train_cfg = dict(val_interval=120)
