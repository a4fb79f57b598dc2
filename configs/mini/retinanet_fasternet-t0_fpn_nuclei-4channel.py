# RetinaNet on images of four channels. Made by:
# python -m fasternet_det.datasets.nuclei data/nuclei-4channel --kind 4channel
_base_ = './retinanet_fasternet-t0_fpn_nuclei.py'
data_root = 'data/nuclei-4channel/'
model = dict(
    data_preprocessor=dict(
        type='MultiChannelDataPreprocessor',
        mean=[32.0, 32.0, 32.0, 32.0],
        std=[24.0, 23.0, 22.0, 20.0],
        bgr_to_rgb=False,
    ),
    backbone=dict(in_channels=4),
)
load_image = dict(
    type='LoadImageFromFile', color_type='unchanged', to_float32=True
)
train_pipeline = [load_image, *_base_.train_pipeline[1:]]
test_pipeline = [load_image, *_base_.test_pipeline[1:]]
train_dataloader = dict(
    dataset=dict(data_root=data_root, pipeline=train_pipeline)
)
val_dataloader = dict(
    dataset=dict(data_root=data_root, pipeline=test_pipeline)
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/val.json')
test_evaluator = val_evaluator
