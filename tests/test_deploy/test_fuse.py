"""What has no faster form, or another one, computes as it does."""

import copy
from pathlib import Path

import pytest
import torch
from fill import fill_input
from mmcv.cnn import ConvModule
from mmdet.models.dense_heads import RPNHead
from mmdet.models.necks import FPN
from mmdet.models.roi_heads.bbox_heads import Shared2FCBBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from fasternet_det import FasterNet, GGhostRegNet, GhostNet, SlotRPNHead
from fasternet_det.deploy import fold, fuse, operators, optimize
from fasternet_det.deploy.blocks import FastFPN
from fasternet_det.deploy.decode import RPNDecoder, _predicts_by_class
from fasternet_det.deploy.operators import (
    FlattenPixels,
    FusedConv2d,
    FusedLinear,
    FusedUpsample,
)

ROOT = Path(__file__).parents[2]
BN, GN = dict(type='BN'), dict(type='GN', num_groups=2)
TINY = dict(depths=(2, 2, 2, 2), widths=(8, 16, 24, 32), group_width=8)


def image(*shape):
    return torch.from_numpy(fill_input(0, shape))


class Twice(nn.Module):
    """One layer under two names, beside an unused name."""

    def __init__(self, layer):
        super().__init__()
        self.one = self.other = layer
        self.register_module('none', None)

    def forward(self, x):
        return self.one(x) + self.other(x).relu()


def computed(**kwargs):
    """A convolution whose weight is computed before each forward."""
    return nn.utils.spectral_norm(nn.Conv2d(6, 8, 3, **kwargs))


MODULES = {
    'same': (lambda: nn.Conv2d(6, 8, 3, padding='same'), 0),
    'reflect': (lambda: nn.Conv2d(6, 8, 3, padding_mode='reflect'), 0),
    'computed': (lambda: nn.Sequential(computed()), 0),
    'computed in a block': (
        lambda: ConvModule(6, 8, 3, norm_cfg=BN, with_spectral_norm=True),
        0,
    ),
    'computed in a block without norm': (
        lambda: ConvModule(6, 8, 3, with_spectral_norm=True),
        0,
    ),
    'act': (lambda: ConvModule(6, 8, 3, norm_cfg=BN), 1),
    'no act': (lambda: ConvModule(6, 8, 3, norm_cfg=BN, act_cfg=None), 1),
    'other act': (
        lambda: ConvModule(6, 8, 3, act_cfg=dict(type='LeakyReLU')),
        1,
    ),
    'other norm': (lambda: ConvModule(6, 8, 3, norm_cfg=GN), 1),
    'standardised': (  # reads its weight as it lies
        lambda: ConvModule(6, 8, 3, conv_cfg=dict(type='ConvWS'), norm_cfg=GN),
        0,
    ),
    'act first': (
        lambda: ConvModule(6, 8, 3, order=('act', 'conv', 'norm')),
        1,
    ),
    'padded': (
        lambda: ConvModule(6, 8, 3, padding=1, padding_mode='reflect'),
        1,
    ),
    'twice': (lambda: Twice(nn.Conv2d(6, 8, 3)), 1),
    'up': (lambda: nn.ConvTranspose2d(6, 8, 2, 2), 1),
    'up by 4x4': (lambda: nn.ConvTranspose2d(6, 8, 4, 2), 0),
    'up, padded': (lambda: nn.ConvTranspose2d(6, 8, 2, 2, 1), 0),
    'up, longer': (lambda: nn.ConvTranspose2d(6, 8, 2, 2, 0, 1), 0),
    'up, in groups': (lambda: nn.ConvTranspose2d(6, 8, 2, 2, groups=2), 0),
    'up, dilated': (lambda: nn.ConvTranspose2d(6, 8, 2, 2, dilation=2), 0),
    'up, computed': (
        lambda: nn.utils.spectral_norm(nn.ConvTranspose2d(6, 8, 2, 2)),
        0,
    ),
    'linear': (lambda: nn.Linear(7, 8), 1),
    'linear, computed': (lambda: nn.utils.spectral_norm(nn.Linear(7, 8)), 0),
    'gelu by tanh': (
        lambda: ConvModule(
            6, 8, 3, act_cfg=dict(type='GELU', approximate='tanh')
        ),
        1,
    ),
}


@torch.no_grad()
@pytest.mark.parametrize('name', MODULES)
def test_modules(name, tamed):
    build, count = MODULES[name]
    model = tamed(nn.Sequential(build()))
    fast = optimize(model)
    x = image(2, 6, 9, 7)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    kinds = (FusedConv2d, FusedUpsample, FusedLinear)
    found = {m for m in fast.modules() if isinstance(m, kinds)}
    assert len(found) == count


@torch.no_grad()
@pytest.mark.parametrize('build', [FasterNet, GGhostRegNet, GhostNet])
def test_blocks_with_other_norms(build, tamed):
    """These are not folded, so that blocks compute step by step."""
    arch = dict(embed_dim=8, depths=(1, 1, 1, 1), act_cfg=dict(type='ReLU'))
    if build is not FasterNet:
        arch = TINY if build is GGhostRegNet else 0.25
    model = tamed(build(arch, norm_cfg=GN))
    x = image(1, 3, 64, 64)
    for out, expected in zip(optimize(model)(x), model(x), strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_models_of_inference_mode():
    """Their weights have no version."""
    with torch.inference_mode():
        fast = optimize(nn.Sequential(nn.Conv2d(6, 8, 3)).eval())
        x = image(1, 6, 9, 7)
        expected = torch.nn.functional.conv2d(x, fast[0].weight, fast[0].bias)
        torch.testing.assert_close(fast(x), expected)


@MODELS.register_module()
class HalfActivated(nn.Conv2d):
    """A plug-in with an activation that is not its last step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.activation = nn.ReLU()

    def forward(self, x):
        return super().forward(self.activation(x))


class OtherRPNHead(RPNHead):
    """One that might compute something else."""

    def forward_single(self, x):
        return super().forward_single(-x)


RPN = dict(
    in_channels=8,
    feat_channels=8,
    test_cfg=ConfigDict(nms_pre=9, nms=dict(type='nms', iou_threshold=0.7)),
)


@torch.no_grad()
@pytest.mark.parametrize(
    'build, count',
    [
        (lambda: RPNHead(**RPN), 0),
        (lambda: RPNHead(**RPN, num_convs=2), 2),
        (lambda: SlotRPNHead(**RPN, conv_cfg=dict(type='TShapedConv')), 0),
        (lambda: SlotRPNHead(**RPN, conv_cfg=dict(type='SPConv')), 2),
        (lambda: SlotRPNHead(**RPN, conv_cfg=dict(type='HalfActivated')), 2),
        (lambda: OtherRPNHead(**RPN), 2),
    ],
    ids=['one', 'two', 't-shaped', 'spconv', 'plug-in', 'other'],
)
def test_relu_of_rpn(build, count, tamed, monkeypatch):
    """It is part of the convolution where that is known, and left out then."""
    head = tamed(build())
    maps = [image(2, 8, 9, 7), image(2, 8, 5, 4)]
    expected = head(maps)
    decoder = RPNDecoder(fuse.fuse(head))
    calls, relu = [], nn.functional.relu
    monkeypatch.setattr(
        nn.functional, 'relu', lambda x, **_: calls.append(x) or relu(x)
    )
    for a, b in zip(decoder(maps), expected, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
    # that of the plug-in too
    count *= 1 + isinstance(head.rpn_conv, HalfActivated)
    assert len(calls) == count
    decoder.decode(maps, torch.full((2, 2), 64.0))
    assert len(calls) == 2 * count


@torch.no_grad()
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize(
    'options, is_fast',
    [
        (dict(num_outs=4), True),
        (dict(num_outs=4, act_cfg=dict(type='ReLU')), True),
        (dict(num_outs=4, norm_cfg=GN), True),
        (dict(num_outs=2, end_level=2, start_level=1), True),
        *(
            (
                dict(
                    num_outs=5,
                    start_level=1,
                    add_extra_convs=source,
                    relu_before_extra_convs=relu,
                ),
                True,
            )
            for source in (False, 'on_input', 'on_lateral', 'on_output')
            for relu in (False, True)
        ),
        (dict(num_outs=3, upsample_cfg=dict(mode='bilinear')), False),
    ],
)
def test_fpn(options, is_fast, dtype, tamed):
    """The laterals are added into the maps from above, whose sides are odd."""
    fpn = FPN([4, 6, 8], 8, **options)
    fpn = tamed(fpn).to(dtype)
    inputs = [
        image(2, 4 + 2 * i, *sides).to(dtype)
        for i, sides in enumerate([(21, 16), (11, 8), (5, 4)])
    ]
    expected, before = fpn(inputs), copy.deepcopy(inputs)
    fast = fuse.fuse(fpn)
    assert (type(fast) is FastFPN) == is_fast
    for layout in (torch.contiguous_format, torch.channels_last):
        maps = [x.contiguous(memory_format=layout) for x in inputs]
        for a, b in zip(fast(maps), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        for a, b in zip(maps, before, strict=True):
            assert torch.equal(a, b)


def test_fpn_of_a_detector_adds_in_place():
    init_default_scope('mmdet')
    path = 'configs/mini/mask-rcnn_fasternet-t0_fpn_nuclei.py'
    model = MODELS.build(Config.fromfile(ROOT / path).model).eval()
    assert type(optimize(model).neck) is FastFPN


@torch.no_grad()
@pytest.mark.parametrize(
    'options, is_fast',
    [
        (dict(type='Shared2FCBBoxHead'), True),
        (dict(type='Shared4Conv1FCBBoxHead', norm_cfg=BN), True),
        (dict(type='ConvFCBBoxHead', num_shared_fcs=1), True),
        (dict(type='Shared2FCBBoxHead', with_avg_pool=True), False),
        (dict(type='ConvFCBBoxHead', num_cls_fcs=1, num_reg_fcs=1), False),
        (dict(type='ConvFCBBoxHead', num_shared_convs=1), False),
    ],
)
def test_regions_are_read_as_they_lie(options, is_fast, tamed):
    """Height and width differ, so that no order passes for another."""
    init_default_scope('mmdet')
    head = MODELS.build(
        dict(
            **(options | dict(roi_feat_size=(3, 2), in_channels=8)),
            **dict(conv_out_channels=8, fc_out_channels=16, num_classes=3),
        )
    )
    x = image(5, 8, 3, 2).contiguous(memory_format=torch.channels_last)
    expected = tamed(head)(x)
    fast = fuse.fuse(fold(head))
    *_, last = (None, *fast.shared_convs)
    assert isinstance(last, FlattenPixels) == is_fast
    for a, b in zip(fast(x), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_computed_weights_keep_their_order(tamed):
    head = tamed(Shared2FCBBoxHead(in_channels=8, roi_feat_size=3))
    nn.utils.spectral_norm(head.shared_fcs[0]).eval()
    assert not len(fuse.fuse(head).shared_convs)


def test_flat_pixels_are_no_copy():
    x = image(5, 8, 3, 2).contiguous(memory_format=torch.channels_last)
    flat = FlattenPixels()(x)
    assert flat.shape == (5, 48) and flat.data_ptr() == x.data_ptr()


@torch.no_grad()
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_logits_of_a_class(dtype, bias, tamed, monkeypatch):
    """Those of the predicted class, without the others."""
    head = FCNMaskHead(
        *(2, 14, 8, 3, 6), predictor_cfg=dict(type='Conv', bias=bias)
    )
    head = tamed(head).to(dtype)
    fused = fuse.fuse(copy.deepcopy(head))
    assert _predicts_by_class(fused)
    x = image(5, 8, 14, 14).to(dtype)
    labels = torch.tensor([3, 0, 79, 1, 3])
    features = x
    for conv in fused.convs:
        features = conv(features)
    expected = head(x)[torch.arange(5), labels]
    for tile in (1, 2**15, 2**23):  # one map at a time, some, all
        monkeypatch.setattr(operators, 'TILE', tile)
        logits = fused.upsample.logits(features, fused.conv_logits, labels)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fused(x), head(x), rtol=1e-4, atol=1e-5)


class OtherMaskHead(FCNMaskHead):
    """One that might compute something else."""


@pytest.mark.parametrize(
    'kind, kwargs',
    [
        (OtherMaskHead, {}),
        (FCNMaskHead, dict(predictor_cfg=dict(type='NormedConv2d'))),
        (
            FCNMaskHead,
            dict(upsample_cfg=dict(type='nearest', scale_factor=2)),
        ),
        (FCNMaskHead, dict(upsample_cfg=dict(type=None))),
    ],
    ids=['other', 'normed', 'nearest', 'none'],
)
def test_mask_heads_of_which_not_all_is_known(kind, kwargs):
    init_default_scope('mmdet')
    head = kind(1, in_channels=8, conv_out_channels=8, **kwargs).eval()
    assert not _predicts_by_class(fuse.fuse(head))
