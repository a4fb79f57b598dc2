import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from fill import fill_input, sample
from mmcv.cnn import ConvModule, build_conv_layer
from mmdet.models.backbones import ResNet
from mmdet.models.dense_heads import RetinaHead
from mmdet.models.necks import FPN
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from fasternet_det import SPConv

GOLDEN = json.loads(
    (Path(__file__).parents[1] / 'data' / 'spconv.json').read_text()
)
SPCONV = dict(type='SPConv', alpha=0.5)


def image(*shape, seed=0):
    return torch.from_numpy(fill_input(seed, shape))


@pytest.mark.parametrize('case', GOLDEN)
def test_equals_the_original(case, randomise):
    conv = build_conv_layer(
        dict(type='SPConv', alpha=case['alpha']),
        *(case['in_channels'], case['out_channels'], 3),
        stride=case['stride'],
        padding=1,
        bias=False,
    )
    shapes = {k: list(v.shape) for k, v in conv.state_dict().items()}
    assert shapes == case['state_dict']
    assert sum(p.numel() for p in conv.parameters()) == case['params']
    x = image(*case['input_shape'], seed=case['input_seed'])
    out = randomise(conv).eval()(x).detach().numpy()
    (ref,) = case['outputs']
    assert list(out.shape) == ref['shape']
    values, ref_values = np.array(sample(out)), ref['sample']
    error = np.abs(values - ref_values).max() / np.abs(ref_values).max()
    assert error <= 1e-5
    assert out.std(ddof=1) == pytest.approx(ref['std'], rel=1e-5)
    assert out.mean() == pytest.approx(ref['mean'], abs=1e-5 * ref['std'])


@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('size', [(1, 1), (7, 10), (12, 9), (8, 8), (2, 3)])
def test_by_hand_in_train_mode(stride, size, randomise):
    """The paper's formulas; maps of odd sides as if padded with zeros."""
    conv = SPConv(8, 6, 3, stride, padding=1, alpha=0.25, bias=False)
    conv = randomise(conv).double().train()
    x = image(3, 8, *size).double()
    out = conv(x)
    assert out.shape == nn.Conv2d(8, 6, 3, stride, 1).double()(x).shape

    def norm(x, bn):
        mean = x.mean((0, 2, 3), keepdim=True)
        var = x.var((0, 2, 3), unbiased=False, keepdim=True)
        weight, bias = (p[:, None, None] for p in (bn.weight, bn.bias))
        return (x - mean) / (var + bn.eps).sqrt() * weight + bias

    conv2d = nn.functional.conv2d
    pooled = x
    if stride == 2:
        even = torch.zeros(3, 8, size[0] + size[0] % 2, size[1] + size[1] % 2)
        even = even.double()
        even[..., : size[0], : size[1]] = x
        pooled = sum(even[..., i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
    y = conv2d(x[:, :1], conv.gwc.weight[:3], None, stride, 1)
    z = conv2d(x[:, 1:2], conv.gwc.weight[3:], None, stride, 1)
    large = torch.cat((y, z), 1) + conv2d(pooled[:, :2], conv.pwc.weight)
    small = conv2d(pooled[:, 2:], conv.conv1x1.weight, conv.conv1x1.bias)
    large, small = norm(large, conv.bn1), norm(small, conv.bn2)
    means = [v.mean((2, 3), keepdim=True).exp() for v in (large, small)]
    want = (means[0] * large + means[1] * small) / (means[0] + means[1])
    torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    'alpha, params',
    [(1 / 2, 18_345_448), (1 / 4, 16_930_792), (1 / 8, 16_223_464)],
)
def test_resnet50(alpha, params):
    with torch.device('meta'):
        backbone = ResNet(
            50,
            dcn=dict(type='SPConv', alpha=alpha),
            stage_with_dcn=(True,) * 4,
        )
        backbone.fc = nn.Linear(2048, 1000)
        outs = backbone(torch.empty(2, 3, 70, 90))
        plain = ResNet(50)(torch.empty(2, 3, 70, 90))
    assert sum(p.numel() for p in backbone.parameters()) == params
    assert [out.shape for out in outs] == [out.shape for out in plain]
    assert sum(isinstance(m, SPConv) for m in backbone.modules()) == 16


@pytest.mark.parametrize('scope', ['mmdet', 'mmengine', 'mmcv', 'mmpretrain'])
def test_every_scope_finds_it(scope):
    assert MODELS.get('SPConv') is SPConv
    with DefaultScope.overwrite_default_scope(scope):
        conv = build_conv_layer(SPCONV, 8, 8, 3, padding=1)
    assert type(conv) is SPConv


def test_neck_and_head(randomise):
    """FPN's lateral convolutions, of 1x1, stay plain."""
    neck = FPN([16, 32], 8, 4, add_extra_convs='on_input', conv_cfg=SPCONV)
    neck.init_weights()
    head = RetinaHead(2, 8, stacked_convs=2, feat_channels=8, conv_cfg=SPCONV)
    head.init_weights()
    assert all(type(m.conv) is nn.Conv2d for m in neck.lateral_convs)
    assert all(m.conv.bias is not None for m in neck.lateral_convs)
    convs = [*neck.fpn_convs, *head.cls_convs, *head.reg_convs]
    assert [type(m.conv) for m in convs] == [SPConv] * 8
    assert [m.stride for m in convs[:4]] == [(1, 1), (1, 1), (2, 2), (2, 2)]
    maps = neck((image(2, 16, 13, 18), image(2, 32, 7, 9)))
    assert [m.shape[2:] for m in maps] == [(13, 18), (7, 9), (4, 5), (2, 3)]
    scores, boxes = head(maps)
    assert [s.shape[2:] for s in scores] == [m.shape[2:] for m in maps]
    sum(m.square().sum() for m in (*scores, *boxes)).backward()
    for module in (neck, head):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name


def test_conv_module_reads_what_it_needs():
    ours = ConvModule(8, 6, 3, stride=2, padding=1, conv_cfg=SPCONV)
    plain = ConvModule(8, 6, 3, stride=2, padding=1)
    for name in (
        *('in_channels', 'out_channels', 'kernel_size', 'stride', 'padding'),
        *('dilation', 'transposed', 'output_padding', 'groups'),
    ):
        assert getattr(ours, name) == getattr(plain, name), name
        assert getattr(ours.conv, name) == getattr(plain.conv, name), name


@pytest.mark.parametrize('bias', [True, False])
def test_1x1_stays_plain(bias):
    conv = SPConv(8, 6, 1, 2, bias=bias, alpha=0.25)
    assert type(conv) is nn.Conv2d
    assert conv.stride == (2, 2) and (conv.bias is not None) == bias
    assert type(SPConv(3, 5, kernel_size=(1, 1))) is nn.Conv2d


@pytest.mark.parametrize(
    'kwargs, named',
    [
        (dict(kernel_size=7, padding=3), 'kernel_size=7, expected 3'),
        (dict(kernel_size=(3, 1)), r'kernel_size=\(3, 1\), expected 3'),
        (dict(stride=4), 'stride=4, expected 1 or 2'),
        (dict(stride=(1, 2)), r'stride=\(1, 2\), expected 1 or 2'),
        (dict(padding=0), 'padding=0, expected 1'),
        (dict(dilation=2, padding=2), 'padding=2, expected 1'),
        (dict(dilation=2), 'dilation=2, expected 1'),
        (dict(groups=2), 'groups=2, expected 1'),
        (dict(alpha=0), r'alpha=0, not in \(0, 1\)'),
        (dict(alpha=1.0), r'alpha=1.0, not in \(0, 1\)'),
        (dict(in_channels=3), 'in_channels=3.*which is 1: .* two groups'),
        (dict(in_channels=6), 'in_channels=6.*which is 3: .* two groups'),
        (dict(alpha=0.1), 'alpha=0.1.*which is 0: .* two groups'),
        (dict(out_channels=5), 'out_channels=5.*even.* two groups'),
    ],
)
def test_what_it_cannot_serve(kwargs, named):
    kwargs = (
        dict(in_channels=8, out_channels=6, kernel_size=3, padding=1) | kwargs
    )
    with pytest.raises(ValueError, match=f'SPConv got .*{named}'):
        SPConv(**kwargs)


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match='beta'):
        SPConv(8, 8, 3, beta=1)
    with pytest.raises(TypeError, match='beta'):
        SPConv(8, 8, 1, beta=1)


def test_copies_are_equal(randomise):
    conv = randomise(SPConv(8, 6, 3, 2, norm_cfg=dict(type='SyncBN'))).eval()
    assert isinstance(conv.bn1, nn.SyncBatchNorm)
    x = image(2, 8, 9, 12)
    fresh = SPConv(8, 6, 3, 2).eval()
    fresh.load_state_dict(conv.state_dict(), strict=True)
    for other in (
        copy.deepcopy(conv),
        pickle.loads(pickle.dumps(conv)),
        fresh,
    ):
        assert torch.equal(conv(x), other(x))


@pytest.mark.deploy
def test_exports(randomise):
    conv = randomise(SPConv(8, 6, 3, 2)).eval()
    dims = {i: torch.export.Dim.AUTO for i in (0, 2, 3)}
    program = torch.export.export(
        conv, (image(2, 8, 9, 12),), dynamic_shapes=(dims,)
    )
    x = image(3, 8, 14, 7)
    torch.testing.assert_close(program.module()(x), conv(x))
