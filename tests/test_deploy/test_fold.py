import copy
from pathlib import Path

import pytest
import torch
from fill import fill_input
from mmcv.cnn import ConvModule
from mmdet.models.dense_heads.tood_head import TaskDecomposition
from mmdet.models.necks import DilatedEncoder
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fasternet_det import FasterNet
from fasternet_det.deploy import fold

CONFIGS = Path(__file__).parents[2] / 'configs'
init_default_scope('mmdet')


def image(*shape):
    return torch.from_numpy(fill_input(0, shape))


def norms(model):
    return [n for n, m in model.named_modules() if isinstance(m, _BatchNorm)]


def close(a, b, tolerance):
    for x, y in zip(a, b, strict=True):
        assert (x - y).abs().max() <= tolerance * y.abs().max()


def build(name):
    path = CONFIGS / name
    return MODELS.build(Config.fromfile(path).model).eval()


@pytest.mark.parametrize(
    'dtype, tolerance', [('double', 1e-12), ('float', 1e-5)]
)
@pytest.mark.parametrize('arch', ['t0', 't2', 's'])
def test_backbone(arch, dtype, tolerance, randomise):
    model = randomise(FasterNet(arch, layer_scale_init_value=1)).eval()
    model = getattr(model, dtype)()
    before = copy.deepcopy(model.state_dict())
    folded = fold(model)
    x = getattr(image(2, 3, 70, 101), dtype)()
    close(folded(x), model(x), tolerance)
    assert norms(folded) == ['norm0', 'norm2', 'norm4', 'norm6']
    assert not any(p.requires_grad for p in folded.parameters())
    for key, value in model.state_dict().items():  # untouched
        assert torch.equal(value, before[key])


def test_classifier(randomise):
    model = randomise(FasterNet('t0', fork_feat=False)).eval().double()
    folded = fold(model)
    x = image(2, 3, 64, 64).double()
    close([folded(x)], [model(x)], 1e-12)
    assert norms(folded) == []


@pytest.mark.parametrize(
    'name, left',
    [
        ('fasternet/mask-rcnn_fasternet-t0_fpn_1x_coco.py', []),
        # Its extra level reads the last output through a padded convolution.
        (
            'fasternet/retinanet_fasternet-t0_fpn_1x_coco.py',
            ['backbone.norm6'],
        ),
        ('mini/mask-rcnn_fasternet-t0_fpn_nuclei.py', []),
        ('mini/retinanet_fasternet-t0_fpn_nuclei.py', []),
    ],
)
def test_detector(name, left, randomise):
    model = randomise(build(name)).double()
    folded = fold(model)
    assert norms(folded) == left
    x = image(2, 3, 128, 96).double()
    maps, folded_maps = model.extract_feat(x), folded.extract_feat(x)
    close(folded_maps, maps, 1e-12)
    head = 'rpn_head' if hasattr(model, 'rpn_head') else 'bbox_head'
    for a, b in zip(
        getattr(folded, head)(maps), getattr(model, head)(maps), strict=True
    ):
        close(a, b, 1e-12)


def test_output_that_the_neck_does_not_read(randomise):
    cfg = Config.fromfile(
        CONFIGS / 'fasternet/retinanet_fasternet-t0_fpn_1x_coco.py'
    ).model
    cfg.backbone.out_indices = (0, 2, 4, 6)
    cfg.neck.update(in_channels=[40, 80, 160, 320], start_level=1)
    model = randomise(MODELS.build(cfg)).eval().double()
    folded = fold(model)
    assert norms(folded) == ['backbone.norm6']
    x = image(1, 3, 64, 64).double()
    close(folded.extract_feat(x), model.extract_feat(x), 1e-12)


def test_train_mode_is_refused():
    model = FasterNet('t0')
    with pytest.raises(ValueError, match='in train mode: call eval'):
        fold(model)
    model.eval().norm0.train()
    with pytest.raises(ValueError, match='in train mode: call eval'):
        fold(model)


def test_what_is_unknown_stays(randomise, log):
    """And is named, once."""
    model = FasterNet('t0')
    model.stages[0].blocks[0].mlp[2] = nn.Sequential(
        nn.BatchNorm2d(80), nn.ReLU()
    )
    randomise(model).eval()
    folded = fold(model)
    left = 'stages.0.blocks.0.mlp.2.0'
    assert norms(folded) == [left, 'norm0', 'norm2', 'norm4', 'norm6']
    assert log() == [
        'fold: 1 norms stay, as nothing declares what is before them, or it '
        f'cannot take them: {left}'
    ]
    x = image(1, 3, 64, 64)
    close(folded(x), model(x), 1e-5)


def test_twice(randomise):
    model = randomise(FasterNet('t0')).eval()
    once = fold(model)
    x = image(1, 3, 64, 64)
    close(fold(once)(x), once(x), 0)


def test_tensors_that_training_left(randomise):
    """mmdet's CondInst keeps some, and deepcopy refuses their graph."""
    model = randomise(FasterNet('t0')).eval()
    x = image(1, 3, 64, 64)
    model.kept = dict(maps=model(x))
    folded = fold(model)
    close(folded.kept['maps'], model.kept['maps'], 0)
    assert not folded.kept['maps'][0].requires_grad
    assert model.kept['maps'][0].requires_grad


@torch.no_grad()
def test_weights_that_hooks_compute(randomise):
    """spectral_norm sets the weight before each forward."""
    module = ConvModule(
        *(3, 8, 3), norm_cfg=dict(type='BN'), with_spectral_norm=True
    )
    module = randomise(module).eval()
    x = image(1, 3, 9, 7)
    expected = module(x)
    folded = fold(module)
    assert norms(folded) == ['bn']
    close([folded(x)], [expected], 1e-6)


@pytest.mark.parametrize('head', ['RetinaSepBNHead', 'RTMDetSepBNHead'])
def test_convolutions_that_levels_share(head, randomise):
    """Each level has own norms, so each needs a folded convolution."""
    if head == 'RTMDetSepBNHead':
        cfg = Config.fromfile(CONFIGS / 'mini/rtmdet_fasternet-t0_nuclei.py')
    else:
        cfg = Config.fromfile(
            CONFIGS / 'mini/retinanet_fasternet-t0_fpn_nuclei.py'
        )
        cfg.model.bbox_head.update(type=head, num_ins=3)
    model = randomise(MODELS.build(cfg.model)).eval().double()
    folded = fold(model)
    assert not any('head' in name for name in norms(folded))
    x = image(2, 3, 128, 96).double()
    maps = model.extract_feat(x)
    for a, b in zip(folded.bbox_head(maps), model.bbox_head(maps)):
        close(a, b, 1e-12)


@torch.no_grad()
def test_laterals_whose_weights_hooks_compute(randomise):
    path = 'fasternet/mask-rcnn_fasternet-t0_fpn_1x_coco.py'
    model = randomise(build(path)).double()
    nn.utils.spectral_norm(model.neck.lateral_convs[1].conv).eval()
    x = image(1, 3, 64, 64).double()
    expected = model.extract_feat(x)
    folded = fold(model)
    assert norms(folded) == ['backbone.norm2']
    close(folded.extract_feat(x), expected, 1e-12)


@torch.no_grad()
@pytest.mark.parametrize('norm_cfg', [None, dict(type='BN')])
def test_other_convolutions_stay(norm_cfg, tamed):
    """ConvWS standardises its weight, so a folded one would be wrong."""
    cfg = Config.fromfile(
        CONFIGS / 'fasternet/mask-rcnn_fasternet-t0_fpn_1x_coco.py'
    ).model
    cfg.neck.update(conv_cfg=dict(type='ConvWS'), norm_cfg=norm_cfg)
    model = tamed(MODELS.build(cfg)).double()
    folded = fold(model)
    outputs = [f'backbone.norm{i}' for i in (0, 2, 4, 6)]
    laterals = [f'neck.lateral_convs.{i}.bn' for i in range(4)]
    outs = [f'neck.fpn_convs.{i}.bn' for i in range(4)]
    left = outputs + (laterals + outs if norm_cfg else [])
    assert norms(folded) == left
    x = image(1, 3, 64, 64).double()
    close(folded.extract_feat(x), model.extract_feat(x), 1e-12)


@torch.no_grad()
def test_what_reads_weights_stays(tamed):
    """TOOD's TaskDecomposition reads its convolution's weight, not a bias."""
    decomposition = TaskDecomposition(16, 4, 8, norm_cfg=dict(type='BN'))
    tamed(decomposition)
    folded = fold(decomposition)
    assert norms(folded) == ['reduction_conv.bn']
    x = image(2, 64, 9, 7)
    close([folded(x)], [decomposition(x)], 0)


@torch.no_grad()
def test_yolofs_neck(tamed):
    neck = tamed(DilatedEncoder(32, 16, 8, 2, [2, 4])).double()
    folded = fold(neck)
    assert norms(folded) == []
    x = image(1, 32, 9, 7).double()
    close(folded((x,)), neck((x,)), 1e-12)


@torch.no_grad()
@pytest.mark.parametrize(
    'order, left',
    [
        (('conv', 'norm', 'act'), []),
        (('act', 'conv', 'norm'), []),
        (('norm', 'act', 'conv'), ['bn']),
        (('conv', 'act', 'norm'), ['bn']),
    ],
)
def test_orders_of_a_block(order, left, tamed):
    """Just a norm that reads the convolution's output is part of it."""
    norm_cfg = dict(type='BN')
    block = tamed(ConvModule(6, 6, 3, norm_cfg=norm_cfg, order=order)).double()
    folded = fold(block)
    assert norms(folded) == left
    x = image(2, 6, 9, 7).double()
    close([folded(x)], [block(x)], 1e-12)


@torch.no_grad()
def test_norms_that_mmcv_folds_at_each_call(tamed):
    block = ConvModule(
        *(6, 6, 3),
        norm_cfg=dict(type='BN'),
        act_cfg=dict(type='LeakyReLU'),
        efficient_conv_bn_eval=True,
    )
    block = tamed(block).double()
    folded = fold(block)
    assert norms(folded) == []
    x = image(2, 6, 9, 7).double()
    close([folded(x)], [block(x)], 1e-12)


@torch.no_grad()
def test_output_norms_of_another_kind(tamed):
    """Of a group norm, there is nothing that a lateral could take over."""
    cfg = Config.fromfile(
        CONFIGS / 'fasternet/retinanet_fasternet-t0_fpn_1x_coco.py'
    ).model
    cfg.backbone.update(norm_cfg=dict(type='GN', num_groups=4))
    model = tamed(MODELS.build(cfg)).double()
    x = image(1, 3, 64, 64).double()
    folded = fold(fold(model))
    close(folded.extract_feat(x), model.extract_feat(x), 1e-12)
