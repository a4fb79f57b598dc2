"""What the fast form predicts in bfloat16 with each kind of mmdet's heads.

The predictors get weights of zero, so that the detections do not depend on
maps that bfloat16 rounds, and must equal those in float32: what else differs
is boxes or scores that were computed in bfloat16.
"""

import copy
import re
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.utils import get_installed_path

from fasternet_det.deploy import optimize
from fasternet_det.deploy.operators import FusedConv2d

init_default_scope('mmdet')
pytestmark = pytest.mark.deploy
CONFIGS = Path(get_installed_path('mmdet'), '.mim', 'configs')
BASES = '_base_/models'
PREDICTOR = re.compile(
    r'(_cls|_reg|_centerness|_obj|(conv_cls|conv_reg|conv_obj|_pred)\.\d'
    r'|rtm_(cls|reg)\.\d|(cls|reg)_convs\.\d\.0|_head\.2)$'
)
ALL, THREE, TWO, FIRST, LAST = (0, 2, 4, 6), (2, 4, 6), (2, 4), (0,), (6,)
WIDTHS = {0: 40, 2: 80, 4: 160, 6: 320}
FASTER, RETINA = (
    f'{BASES}/faster-rcnn_r50_fpn.py',
    f'{BASES}/retinanet_r50_fpn.py',
)
CENTERNET = 'centernet/centernet_r18_8xb16-crop512-140e_coco.py'
SSD_WIDTHS = [80, 160, 512, 256, 256, 256]
RTMDET_HEAD = dict(
    _delete_=True,
    type='RTMDetHead',
    num_classes=8,
    in_channels=96,
    feat_channels=96,
    anchor_generator=dict(
        type='MlvlPointGenerator', offset=0, strides=[8, 16, 32]
    ),
    bbox_coder=dict(type='DistancePointBBoxCoder'),
    loss_cls=dict(type='QualityFocalLoss'),
    loss_bbox=dict(type='GIoULoss'),
    with_objectness=False,
)
RTMDET = dict(bbox_head=RTMDET_HEAD)
SSD = dict(
    neck=dict(in_channels=SSD_WIDTHS[:2], out_channels=SSD_WIDTHS),
    bbox_head=dict(in_channels=SSD_WIDTHS),
)
SEPBN = dict(bbox_head=dict(type='RetinaSepBNHead', num_ins=5))
# Name, config, outputs of the backbone, changes.
KNOWN = [
    ('rpn', f'{BASES}/rpn_r50_fpn.py', ALL, {}),
    ('retina', RETINA, ALL, {}),
    ('retina-sepbn', RETINA, ALL, SEPBN),
    ('fsaf', 'fsaf/fsaf_r50_fpn_1x_coco.py', ALL, {}),
    ('fcos', 'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py', ALL, {}),
    ('atss', 'atss/atss_r50_fpn_1x_coco.py', ALL, {}),
    ('paa', 'paa/paa_r50_fpn_1x_coco.py', ALL, {}),
    ('gfl', 'gfl/gfl_r50_fpn_1x_coco.py', ALL, {}),
    ('rtmdet', 'rtmdet/rtmdet_tiny_8xb32-300e_coco.py', THREE, RTMDET),
    ('rtmdet-sepbn', 'rtmdet/rtmdet_tiny_8xb32-300e_coco.py', THREE, {}),
    ('yolox', 'yolox/yolox_tiny_8xb8-300e_coco.py', THREE, {}),
    ('yolov3', 'yolo/yolov3_mobilenetv2_8xb24-ms-416-300e_coco.py', THREE, {}),
    ('ssd', f'{BASES}/ssd300.py', TWO, SSD),
    ('faster-rcnn', FASTER, ALL, {}),
    ('cascade', f'{BASES}/cascade-mask-rcnn_r50_fpn.py', ALL, {}),
]  # fmt: skip
UNKNOWN = [
    ('centernet', CENTERNET, FIRST, {}),
    ('groie', 'groie/faste-rcnn_r50_fpn_groie_1x_coco.py', ALL, {}),
    ('vfnet', 'vfnet/vfnet_r50-mdconv-c3-c5_fpn_ms-2x_coco.py', ALL, {}),
    ('detr', 'detr/detr_r50_8xb2-150e_coco.py', LAST, {}),
    ('maskformer', 'maskformer/maskformer_r50_ms-16xb1-75e_coco.py', ALL, {}),
]  # fmt: skip


def adapt(config):
    """Softmax over 80 classes leaves little to each; few boxes are quick."""
    for key, value in config.items():
        if key in ('score_thr', 'conf_thr'):
            config[key] = 0.001
        elif key == 'max_per_img':
            config[key] = 20
        elif isinstance(value, dict):
            adapt(value)


def build(name, path, outputs, changes):
    """A detector with FasterNet-T0, its predictors' weights zero."""
    torch.manual_seed(0)
    config = Config.fromfile(CONFIGS / path)
    config.merge_from_dict(dict(model=changes))
    model = config.model
    model.backbone = dict(type='FasterNet', arch='t0', out_indices=outputs)
    widths = [WIDTHS[i] for i in outputs]
    if name == 'yolov3':
        widths.reverse()
    if name == 'centernet':  # its own neck's deconvolutions cannot be folded
        model.neck = dict(type='FPN', out_channels=64, num_outs=1)
    if name == 'maskformer':
        model.panoptic_head.in_channels = widths
        model.panoptic_head.pixel_decoder.encoder.num_layers = 1
        model.panoptic_head.transformer_decoder.num_layers = 1
        model.test_cfg.update(instance_on=True, object_mask_thr=0)
    else:
        model.neck.in_channels = widths
    adapt(model.test_cfg)
    model = MODELS.build(model).eval()
    for layer_name, layer in model.named_modules():
        if PREDICTOR.search(layer_name) and hasattr(layer, 'weight'):
            layer.weight.data.zero_()
            layer.bias.data.uniform_(0.1, 0.9)
    if name == 'ssd':  # which its predict asks for, but lacks
        model.bbox_head.loss_cls = None
    if name == 'centernet':
        model.bbox_head.wh_head[-1].bias.data.fill_(200.3 / 4)
    return model


@torch.no_grad()
def predict(model, size=288):
    meta = dict(
        img_shape=(size, size),
        ori_shape=(size, size),
        pad_shape=(size, size),
        batch_input_shape=(size, size),
        scale_factor=(1.0, 1.0),
        border=(0, size, 0, size),
    )
    x = torch.rand(
        1, 3, size, size, generator=torch.Generator().manual_seed(0)
    )
    (sample,) = model.predict(x, [DetDataSample(metainfo=meta)])
    return sample


@pytest.mark.parametrize('case', KNOWN + UNKNOWN[:2], ids=lambda case: case[0])
def test_boxes_are_computed_in_float32(case):
    model = build(*case)
    # Of equal scores, mmdet's sorting takes any.
    expected, found = (
        predict(optimize(model, dtype)).pred_instances
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert len(found) == len(expected) > 0
    assert found.bboxes.dtype == found.scores.dtype == torch.float32
    torch.testing.assert_close(found.scores, expected.scores)
    # In any order: boxes at different places have the same scores.
    apart = torch.cdist(found.bboxes, expected.bboxes, p=torch.inf)
    assert apart.min(1).values.max() < 1e-3
    sides = found.bboxes[:, 2:] - found.bboxes[:, :2]
    assert (sides.bfloat16().float() - sides).abs().max() > 5e-3


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('case', UNKNOWN, ids=lambda case: case[0])
def test_unknown_heads_stay_as_they_are(case, dtype):
    """One that reads memory of another layout, or no bfloat16, is right."""
    model = build(*case)
    # mmcv's ops read its weights as if they were (C_out, C_in, H, W)
    other = copy.deepcopy(model).to(memory_format=torch.channels_last)
    fast = optimize(other, dtype)
    assert any(isinstance(m, FusedConv2d) for m in fast.backbone.modules())
    model.extract_feat = fast.extract_feat
    expected, found = predict(model), predict(fast)
    instances = found.pred_instances
    assert len(instances) > 0
    for key in ('scores', 'labels', 'bboxes'):
        torch.testing.assert_close(
            instances[key],
            expected.pred_instances[key],
            rtol=1e-2,
            atol=1e-3,
        )
    if 'masks' in instances:  # rounding moves edges
        same = instances.masks == expected.pred_instances.masks
        assert same.float().mean() > 0.999
