"""Decoding in tensors gives mmdet's detections, in torch and exported.

All configs, at all sizes: `pytest tests/test_deploy/test_decode.py -m configs`
takes minutes for each.
"""

import copy
import pickle
from contextlib import nullcontext
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mmdet.models import RPN
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import get_box_tensor
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData
from mmengine.utils import get_installed_path
from torch import nn

from fasternet_det.deploy import optimize
from fasternet_det.deploy.decode import (
    Decoder,
    DenseDecoder,
    EndToEnd,
    GFLDecoder,
    RoIDecoder,
    RPNDecoder,
    RTMDetInsDecoder,
    YOLOXDecoder,
    decode_heads,
)
from fasternet_det.deploy.evaluate import ExportedDetector
from fasternet_det.deploy.export import export, load

pytestmark = pytest.mark.deploy
OURS = Path(__file__).parents[2] / 'configs'
MMDET = Path(get_installed_path('mmdet'), '.mim', 'configs')
MODELS_OF = '_base_/models'
FASTER = f'{MODELS_OF}/faster-rcnn_r50_fpn.py'
RETINANET = f'{MODELS_OF}/retinanet_r50_fpn.py'
INS = 'rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py'
AGNOSTIC = dict(
    roi_head=dict(bbox_head=dict(reg_class_agnostic=True)),
    test_cfg=dict(rcnn=dict(nms=dict(class_agnostic=True))),
)
# Config of mmdet, changes of its model, and what decodes it.
KINDS = {
    'rpn': (f'{MODELS_OF}/rpn_r50_fpn.py', {}, RPNDecoder),
    'retinanet': (RETINANET, {}, DenseDecoder),
    'fsaf': ('fsaf/fsaf_r50_fpn_1x_coco.py', {}, DenseDecoder),
    'fcos': ('fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py', {}, DenseDecoder),
    'atss': ('atss/atss_r50_fpn_1x_coco.py', {}, DenseDecoder),
    'gfl': ('gfl/gfl_r50_fpn_1x_coco.py', {}, GFLDecoder),
    'rtmdet': ('rtmdet/rtmdet_tiny_8xb32-300e_coco.py', {}, DenseDecoder),
    'rtmdet-ins': (INS, {}, RTMDetInsDecoder),
    'yolox': ('yolox/yolox_tiny_8xb8-300e_coco.py', {}, YOLOXDecoder),
    'faster-rcnn': (FASTER, {}, RoIDecoder),
    'dynamic-rcnn': (
        *('dynamic_rcnn/dynamic-rcnn_r50_fpn_1x_coco.py', {}, RoIDecoder),
    ),
    'agnostic': (FASTER, AGNOSTIC, RoIDecoder),
    'mask-rcnn': (f'{MODELS_OF}/mask-rcnn_r50_fpn.py', {}, RoIDecoder),
    'cascade': (f'{MODELS_OF}/cascade-mask-rcnn_r50_fpn.py', {}, RoIDecoder),
}
RUNTIMES = ['onnxruntime', 'openvino']
MOST = 20  # detections in an image
INS_STRIDE = 8  # of the masks that RTMDet-Ins exports
# Scores neither saturate nor lie in one place, and boxes are near their
# priors: standard deviation and mean of what predictors give.
SPREADS = {
    'rtm_reg': (0.5, 1.5),
    'rtm_kernel': (0.3, 0),
    'reg_convs': (1, 0),
    'cls_convs': (1, 0),
    '_reg': (0.5, 0),
    '_cls': (1.5, -2),
    '_obj': (1.5, 0),
}
SIDES = ((96, 128), (70, 100), (128, 90))


@torch.no_grad()
def tame(model):
    """Seed a detector, each layer's outputs of a known spread."""
    generator = torch.Generator().manual_seed(0)
    names, hooks = {}, []

    def scale(layer, args, out):
        name = names.pop(layer, None)
        if name is None or out.numel() < 2:
            return None
        spread, mean = next(
            (v for k, v in SPREADS.items() if k in name), (1, 0)
        )
        factor = spread / float(out.std())
        for kind in ('weight', 'weight_gamma', 'weight_beta', 'weight_diff'):
            if hasattr(layer, kind):  # the others are ConvAWS2d's and SAConv's
                getattr(layer, kind).mul_(factor)
        if layer.bias is None:
            return out * factor
        layer.bias.mul_(factor).add_(mean)
        return out * factor + mean

    for name, layer in model.named_modules():
        if hasattr(layer, 'running_var'):
            for value in (layer.weight, layer.running_var):
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
            for value in (layer.bias, layer.running_mean):
                value.copy_(torch.randn(value.shape, generator=generator) / 10)
        elif isinstance(layer, (nn.Conv2d, nn.Linear, nn.ConvTranspose2d)):
            for value in layer.parameters(recurse=False):
                value.copy_(torch.randn(value.shape, generator=generator))
            names[layer] = name
            hooks.append(layer.register_forward_hook(scale))
    predict(model, *batch([(128, 160)], channels=channels_of(model)))
    for hook in hooks:
        hook.remove()
    return model


def lower_thresholds(config):
    """Find something, but little, which is quick."""
    for key, value in config.items():
        if key == 'score_thr':
            config[key] = 0.02
        elif key == 'max_per_img':
            config[key] = MOST
        elif isinstance(value, dict):
            lower_thresholds(value)


def build(kind, **changes):
    """A small detector of mmdet's with a FasterNet of ours."""
    init_default_scope('mmdet')
    path, more, _ = KINDS[kind]
    config = Config.fromfile(MMDET / path)
    config.merge_from_dict(dict(model=more))
    config.merge_from_dict(dict(model=changes))
    model = config.model
    in_channels = model.neck.in_channels
    positions = (0, 2, 4, 6)[4 - len(in_channels) :]
    model.backbone = dict(
        type='FasterNet',
        arch=dict(embed_dim=8, depths=(1, 1, 1, 1), act_cfg=dict(type='ReLU')),
        out_indices=positions,
    )
    model.neck.in_channels = [8 * 2 ** (i // 2) for i in positions]
    lower_thresholds(model.test_cfg)
    return tame(MODELS.build(model).eval())


def channels_of(model):
    """How many channels a detector takes: those of its first layer."""
    layers = model.backbone.modules()
    return next(m.in_channels for m in layers if isinstance(m, nn.Conv2d))


def batch(sides, divisor=32, channels=3):
    """Images of several sizes, padded by zeros, and their samples."""
    generator = torch.Generator().manual_seed(0)
    height, width = (
        -(-max(side) // divisor) * divisor for side in zip(*sides)
    )
    images = torch.zeros(len(sides), channels, height, width)
    samples = []
    for image, (h, w) in zip(images, sides):
        image[:, :h, :w] = torch.randn(channels, h, w, generator=generator)
        metainfo = dict(
            img_shape=(h, w),
            ori_shape=(round(h / 1.5), round(w / 1.25)),
            scale_factor=(1.25, 1.5),
        )
        samples.append(DetDataSample(metainfo=metainfo))
    return images, samples


@torch.no_grad()
def predict(model, images, samples, rescale=False):
    samples = model.predict(images, copy.deepcopy(samples), rescale=rescale)
    return [sample.pred_instances for sample in samples]


@torch.no_grad()
def leave_one_empty(model, images, samples):
    """Set the threshold so that nothing is found in one of the images."""
    head = getattr(model, 'roi_head', None) or model.bbox_head
    head.test_cfg.score_thr = 0
    best = [float(r.scores.max()) for r in predict(model, images, samples)]
    if hasattr(head, 'conv_centerness') or hasattr(head, 'atss_centerness'):
        # which the threshold is not for
        scores = [level.amax((1, 2, 3)) for level in model._forward(images)[0]]
        best = torch.stack(scores).amax(0).sigmoid().tolist()
    low, high = sorted(best)[:2]
    assert high - low > 1e-5
    head.test_cfg.score_thr = low + 0.1 * (high - low)


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert {'bboxes', 'scores', 'labels'} <= set(a.keys())
        assert torch.equal(a.labels, b.labels.to(a.labels))
        torch.testing.assert_close(a.scores, b.scores, rtol=0, atol=1e-6)
        torch.testing.assert_close(a.bboxes, b.bboxes, rtol=0, atol=1e-4)
        if 'masks' in b:
            assert a.masks.shape == b.masks.shape
            assert a.masks.dtype == b.masks.dtype
            if len(b):
                assert b.masks.any()
                assert (a.masks != b.masks).float().mean() < 1e-4


# ---- in torch


@pytest.mark.parametrize('kind', KINDS)
def test_same_detections(kind):
    """Of images of several sizes, and of one of them none."""
    model = build(kind)
    images, samples = batch(SIDES)
    if kind != 'rpn':
        leave_one_empty(model, images, samples)
    fast = decode_heads(copy.deepcopy(model))
    decoders = [m for m in fast.modules() if isinstance(m, Decoder)]
    assert type(decoders[-1]) is KINDS[kind][2]
    assert len(decoders) == 1 + hasattr(model, 'roi_head')
    for rescale in (False, True):
        expected = predict(model, images, samples, rescale)
        counts = [len(result) for result in expected]
        assert sorted(map(bool, counts)) == [kind == 'rpn', True, True]
        assert_equal(predict(fast, images, samples, rescale), expected)
    for result, (height, width) in zip(predict(fast, *batch(SIDES)), SIDES):
        if len(result) and kind != 'yolox':
            assert result.bboxes[:, 0::2].max() <= width
            assert result.bboxes[:, 1::2].max() <= height


@pytest.mark.parametrize('kind', KINDS)
def test_fast_form(kind):
    """All of its heads is fast, and decodes here."""
    model = build(kind)
    images, samples = batch(SIDES)
    fast = optimize(model)
    decoders = [m for m in fast.modules() if isinstance(m, Decoder)]
    assert type(decoders[-1]) is KINDS[kind][2]
    assert len(decoders) == 1 + hasattr(model, 'roi_head')
    slow = (nn.Conv2d, nn.Linear, nn.ConvTranspose2d)
    assert not [m for d in decoders for m in d.modules() if type(m) in slow]
    for a, b in zip(
        predict(fast, images, samples), predict(model, images, samples)
    ):
        assert len(a) == len(b) > 10
        torch.testing.assert_close(a.scores, b.scores, rtol=0, atol=1e-5)
        # in any order: some scores are all but equal
        apart = (a.bboxes[:, None] - b.bboxes).abs().amax(2)
        apart[a.labels[:, None] != b.labels] = torch.inf
        assert max(apart.amin(0).max(), apart.amin(1).max()) < 1e-3
        if 'masks' in b:
            differ = a.masks[apart.argmin(0)] != b.masks
            assert differ.float().mean() < 1e-3


def test_compiled():
    """Compiling is not recording."""
    model = decode_heads(build('retinanet'))
    images, samples = batch(SIDES)
    expected = predict(model, images, samples)
    head = model.bbox_head
    head.decode = torch.compile(head.decode, backend='eager')
    assert_equal(predict(model, images, samples), expected)


@torch.no_grad()
@pytest.mark.parametrize('kind', ['retinanet', 'mask-rcnn'])
def test_other_uses(kind):
    """Copies, pickles, raw outputs and attributes are as mmdet's."""
    model = build(kind)
    images, samples = batch(SIDES[:1])
    fast = decode_heads(copy.deepcopy(model))
    fast = pickle.loads(pickle.dumps(copy.deepcopy(fast)))
    assert_equal(
        predict(fast, images, samples), predict(model, images, samples)
    )
    assert (fast.with_bbox, fast.with_mask) == (
        model.with_bbox,
        model.with_mask,
    )
    a, b = (m(images, samples, mode='tensor') for m in (fast, model))
    flat = torch.utils._pytree.tree_leaves
    for x, y in zip(flat(a), flat(b), strict=True):
        assert torch.equal(x, y)
    (decoder, *_) = [m for m in fast.modules() if isinstance(m, Decoder)]
    assert decoder.prior_generator is decoder.head.prior_generator
    assert not hasattr(decoder, 'no_such_thing')


def test_test_time_augmentation():
    model = build('retinanet')
    results = []
    images, samples = batch(SIDES[:1])
    samples[0].set_metainfo(dict(flip=False, flip_direction=None))
    flipped = copy.deepcopy(samples[0])
    flipped.set_metainfo(dict(flip=True, flip_direction='horizontal'))
    data = dict(
        inputs=[[images[0]], [images[0].flip(2)]],
        data_samples=[samples, [flipped]],
    )
    for module in (model, decode_heads(copy.deepcopy(model))):
        tta = MODELS.build(
            dict(
                type='DetTTAModel',
                module=module,
                tta_cfg=ConfigDict(
                    nms=dict(type='nms', iou_threshold=0.5), max_per_img=30
                ),
            )
        )
        with torch.no_grad():
            (result,) = tta.test_step(copy.deepcopy(data))
        results.append([result.pred_instances])
    assert len(results[0][0]) > 20
    assert_equal(*results)


@pytest.mark.parametrize(
    'kind, key, value',
    [
        ('retinanet', 'nms', dict(type='soft_nms', iou_threshold=0.1)),
        ('retinanet', 'min_bbox_size', 20),
        ('faster-rcnn', 'nms', dict(type='soft_nms', iou_threshold=0.1)),
    ],
)
def test_other_settings(kind, key, value):
    model = build(kind)
    images, samples = batch(SIDES)
    usual = predict(model, images, samples)
    head = getattr(model, 'roi_head', None) or model.bbox_head
    head.test_cfg[key] = value
    expected = predict(model, images, samples, True)
    fast = decode_heads(model)
    assert_equal(predict(fast, images, samples, True), expected)
    assert any(
        not torch.equal(a.scores, b.scores) for a, b in zip(expected, usual)
    )


def test_coders_of_five_numbers():
    """As mmrotate's, with an angle: its own decoding stays."""
    model = build('retinanet')
    model.bbox_head.bbox_coder.encode_size = 5
    fast = decode_heads(model)
    assert not any(isinstance(m, Decoder) for m in fast.modules())


def test_coders_of_box_types():
    """mmdet's own decoding stays: such coders give no plain tensors."""
    model = build('retinanet')
    images, samples = batch(SIDES)
    expected = predict(model, images, samples, True)
    model.bbox_head.bbox_coder.use_box_type = True
    fast = decode_heads(model)
    assert not any(isinstance(m, Decoder) for m in fast.modules())
    for a, b in zip(predict(fast, images, samples, True), expected):
        torch.testing.assert_close(get_box_tensor(a.bboxes), b.bboxes)


@pytest.mark.parametrize(
    'kind, key, value',
    [
        ('retinanet', 'max_per_img', -1),  # all but the last
        ('faster-rcnn', 'max_per_img', -1),  # all
        ('faster-rcnn', 'min_bbox_size', 30),  # not asked for
        ('yolox', 'max_per_img', 3),
        ('yolox', 'min_bbox_size', 30),
    ],
)
def test_limits(kind, key, value):
    """Each head's are mmdet's: not all heed them."""
    model = build(kind)
    images, samples = batch(SIDES)
    head = getattr(model, 'roi_head', None) or model.bbox_head
    head.test_cfg[key] = value
    expected = predict(model, images, samples, True)
    assert min(map(len, expected)) > 3
    assert_equal(predict(decode_heads(model), images, samples, True), expected)


@pytest.mark.parametrize('kind', ['gfl', 'rtmdet-ins', 'yolox', 'mask-rcnn'])
def test_nothing_found(kind):
    model = build(kind)
    images, samples = batch(SIDES)
    head = getattr(model, 'roi_head', None) or model.bbox_head
    head.test_cfg.score_thr = 1.1
    expected = predict(model, images, samples, True)
    assert not any(map(len, expected))
    assert_equal(predict(decode_heads(model), images, samples, True), expected)


def test_given_proposals():
    model = build('faster-rcnn')
    images, samples = batch(SIDES[:2])
    boxes = torch.tensor([[3.0, 5, 60, 50], [20, 10, 40, 60]])
    samples[0].proposals = InstanceData(bboxes=boxes)
    samples[1].proposals = InstanceData(bboxes=boxes[:0])
    expected = predict(model, images, samples)
    assert [len(result) > 0 for result in expected] == [True, False]
    assert_equal(predict(decode_heads(model), images, samples), expected)


def test_many_boxes_of_few_groups():
    """Which are suppressed group by group."""
    model = build('rpn')
    model.bbox_head.test_cfg.update(nms_pre=1000, max_per_img=5000)
    images, samples = batch([(192, 192)])
    expected = predict(model, images, samples)
    assert len(expected[0]) > 1000
    assert_equal(predict(decode_heads(model), images, samples), expected)


@pytest.mark.parametrize(
    'path, known',
    [
        ('paa/paa_r50_fpn_1x_coco.py', []),
        (f'{MODELS_OF}/ssd300.py', []),
        ('yolo/yolov3_mobilenetv2_8xb24-ms-416-300e_coco.py', []),
        ('detr/detr_r50_8xb2-150e_coco.py', []),
        ('legacy_1.x/retinanet_r50_fpn_1x_coco_v1.py', []),
        ('legacy_1.x/faster-rcnn_r50_fpn_1x_coco_v1.py', []),
        ('double_heads/dh-faster-rcnn_r50_fpn_1x_coco.py', ['rpn_head']),
        ('htc/htc_r50_fpn_1x_coco.py', ['rpn_head']),
        ('pisa/faster-rcnn_r50_fpn_pisa_1x_coco.py', ['rpn_head', 'roi_head']),
    ],
)
def test_unknown_heads_stay(path, known):
    init_default_scope('mmdet')
    config = Config.fromfile(MMDET / path).model
    config.backbone.init_cfg = None
    model = MODELS.build(config).eval()
    with nullcontext() if 'roi_head' in known else pytest.raises(ValueError):
        EndToEnd(model)
    before = dict(model.named_children())
    decode_heads(model)
    after = dict(model.named_children())
    assert [k for k in before if before[k] is not after[k]] == known


# ---- exported


def assert_exports(model, path, runtimes, sizes, stride=None):
    """Compare detections, of two images and of one of them.

    Of one of the two, at the first size, there are none.
    """

    def two(size):
        images, samples = batch([size] * 2, 1, channels_of(model))
        images[1] /= 2  # not uniform, else many scores are equal
        return images, samples

    images, samples = two(sizes[0])
    proposes = isinstance(model, RPN)  # as much in any image
    if not proposes:
        leave_one_empty(model, images, samples)
    counts = [len(r) for r in predict(model, images, samples)]
    assert any(counts) and (0 in counts) != proposes
    found = counts.index(max(counts))
    export(model, path)
    for runtime in runtimes:
        session, count = load(path, runtime, threads=1), 0
        for size, some in product(sizes, ([0, 1], [found])):
            images, samples = two(size)
            images, samples = images[some], [samples[i] for i in some]
            expected = predict(model, images, samples)
            count += sum(map(len, expected))
            if 'masks' in expected[0] and not stride:
                exported = ExportedDetector(session, None)
                for a, b in zip(predict(exported, images, samples), expected):
                    if len(b):
                        assert (a.masks != b.masks).float().mean() < 1e-3
            outputs = map(torch.from_numpy, session(images.numpy()))
            for a, dets, labels, *masks in zip(expected, *outputs):
                a, kept = a[: len(labels)], labels >= 0  # YOLOX has no limit
                assert len(a) == kept.sum() and not dets[~kept].any()
                boxes, scores = dets[kept].split((4, 1), 1)
                scores = scores[:, 0]
                torch.testing.assert_close(scores, a.scores, atol=1e-4, rtol=0)
                # In any order: some scores are all but equal.
                apart = (boxes[:, None] - a.bboxes).abs().amax(2)
                other = labels[kept][:, None] != a.labels
                apart = apart.masked_fill(other, torch.inf)
                # Of those that score as the last one does, any may be kept.
                last = a.scores.min() + 1e-4 if len(a) == MOST else -1
                if len(a):
                    assert (apart.amin(0)[a.scores > last] < 0.01).all()
                    assert (apart.amin(1)[scores > last] < 0.01).all()
                if masks and stride and len(a):
                    logits = F.interpolate(
                        masks[0][None, kept],
                        scale_factor=stride,
                        mode='bilinear',
                    )
                    assert ((logits[0] > 0) != a.masks).float().mean() < 1e-3
        assert count >= 10


@pytest.mark.parametrize(
    'kind, runtimes',
    [
        pytest.param(
            kind,
            RUNTIMES,
            marks=[pytest.mark.configs] * (kind != 'rtmdet-ins'),
        )
        for kind in KINDS
    ],
)
def test_export_of_heads(kind, runtimes, tmp_path):
    model = build(kind)
    stride = INS_STRIDE if kind == 'rtmdet-ins' else None
    sizes = [(96, 128), (64, 64), (160, 224)]
    if model.neck.__class__.__name__ == 'FPN':
        sizes.append((101, 135))
    assert_exports(model, tmp_path / 'a.onnx', runtimes, sizes, stride)


@pytest.mark.configs
@pytest.mark.parametrize(
    'path',
    [
        *sorted(OURS.glob('*/*_*coco*.py')),
        *sorted(OURS.glob('mini/*_*.py')),
    ],
    ids=lambda path: path.stem,
)
def test_export_of_configs(path, tmp_path):
    init_default_scope('mmdet')
    config = Config.fromfile(path).model
    config.backbone.init_cfg = None
    lower_thresholds(config.test_cfg)
    model = tame(MODELS.build(config).eval())
    sizes = [(320, 480), (416, 640), (800, 1216), (800, 1088)]
    if model.neck.__class__.__name__ == 'FPN':
        sizes.append((333, 507))
    assert_exports(model, tmp_path / 'a.onnx', ['onnxruntime'], sizes)
