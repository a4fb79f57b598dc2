import pytest
import torch
import torch.nn.functional as F
from fill import fill_input
from mmcv.cnn import ConvModule, build_conv_layer
from mmdet.models.necks import FPN
from mmdet.registry import MODELS
from mmengine.registry import MODELS as ROOT_MODELS
from torch import nn

from fasternet_det import TShapedConv
from fasternet_det.deploy import optimize
from fasternet_det.deploy.blocks import FastTShapedConv


def image(*shape):
    return torch.from_numpy(fill_input(0, shape))


@pytest.mark.parametrize('size', [(8, 12), (9, 7)])
@pytest.mark.parametrize('dilation', [1, 2])
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('channels', [(8, 6, 2), (7, 10, 1)])
def test_is_a_convolution_of_a_t_shaped_kernel(
    channels, stride, dilation, size, randomise
):
    """One plain convolution, whose other channels see the centre alone."""
    c_in, c_out, c3 = channels
    layer = randomise(
        TShapedConv(c_in, c_out, 3, stride, dilation, dilation)
    ).double()
    point = layer.pointwise_conv.weight[..., 0, 0]  # C_out, C_in
    kernel = torch.zeros(c_out, c_in, 3, 3, dtype=torch.double)
    kernel[:, :c3] = torch.einsum(
        'oc,cikl->oikl', point[:, :c3], layer.partial_conv3.weight
    )
    kernel[:, c3:, 1, 1] = point[:, c3:]
    x = image(2, c_in, *size).double()
    want = F.conv2d(
        *(x, kernel, layer.pointwise_conv.bias),
        stride=stride,
        padding=dilation,
        dilation=dilation,
    )
    torch.testing.assert_close(layer(x), want)


def test_cost():
    """102 thousand multiply-adds a pixel, a plain one 590."""
    layer = TShapedConv(256, 256, 3, bias=False)
    count = sum(p.numel() for p in layer.parameters())
    assert count == 64 * 64 * 9 + 256 * 256 == 102_400
    assert 5.7 < 9 * 256 * 256 / count < 5.8
    half = TShapedConv(256, 256, 3, bias=False, ratio=0.5)
    assert half.partial_conv3.weight.shape == (128, 128, 3, 3)


def test_registered_as_conv_layer():
    assert MODELS.get('TShapedConv') is TShapedConv
    assert ROOT_MODELS.get('TShapedConv') is TShapedConv
    cfg = dict(type='TShapedConv', ratio=0.5)
    pointwise = build_conv_layer(cfg, 8, 6, kernel_size=1, bias=False)
    assert type(pointwise) is nn.Conv2d and pointwise.bias is None
    module = ConvModule(8, 6, 3, 2, 2, 2, conv_cfg=cfg)
    plain = ConvModule(8, 6, 3, 2, 2, 2)
    for name in (
        *('in_channels', 'out_channels', 'kernel_size', 'stride', 'padding'),
        *('dilation', 'transposed', 'output_padding', 'groups'),
    ):
        assert getattr(module, name) == getattr(plain, name), name


@pytest.mark.parametrize(
    'args, kwargs, named',
    [
        ((8, 6, 5), dict(padding=1), 'kernel_size=5, expected 3'),
        ((8, 6, 3, 3), {}, 'stride=3, expected 1 or 2'),
        ((8, 6, 3, (1, 2)), {}, r'stride=\(1, 2\), expected 1 or 2'),
        ((8, 6, 3, 1, 0), {}, 'padding=0, expected 1'),
        ((8, 6, 3, 1, 1, 2), {}, 'padding=1, expected 2'),
        ((8, 6, 3), dict(groups=2), 'groups=2, expected 1'),
        ((3, 6, 3), {}, r'in_channels=3 and ratio=0.25.*is 0.*1 to 2'),
        (
            (8, 6, 3),
            dict(ratio=1.0),
            r'in_channels=8.*ratio=1.0.*is 8, to be 1 to 7',
        ),
    ],
)
def test_bad_arguments(args, kwargs, named):
    with pytest.raises(ValueError, match='TShapedConv got ' + named):
        TShapedConv(*args, **kwargs)
    with pytest.raises(TypeError, match='alpha'):
        TShapedConv(8, 6, 3, alpha=0.5)


@pytest.mark.deploy
@torch.no_grad()
@pytest.mark.parametrize('layout', [torch.channels_last, None])
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('dilation', [1, 3])
def test_fast_form_keeps_its_input(layout, stride, dilation, tamed):
    module = ConvModule(
        *(12, 16, 3, stride, dilation, dilation),
        conv_cfg=dict(type='TShapedConv'),
        norm_cfg=dict(type='BN'),
        act_cfg=dict(type='SiLU'),
    )
    fast = optimize(tamed(module))
    assert type(fast) is FastTShapedConv
    for shape in ((2, 12, 9, 14), (1, 12, 8, 8)):
        x = image(*shape)
        if layout:
            x = x.to(memory_format=layout)
        before = x.clone()
        torch.testing.assert_close(fast(x), module(x), rtol=1e-5, atol=1e-5)
        assert torch.equal(x, before)


@pytest.mark.deploy
@torch.no_grad()
def test_weights_that_hooks_compute(tamed):
    layer = TShapedConv(8, 8, 3)
    nn.utils.parametrizations.weight_norm(layer.pointwise_conv)
    layer.eval()
    fast = optimize(layer)
    x = image(2, 8, 9, 7)
    torch.testing.assert_close(fast(x), layer(x))
    assert type(fast) is TShapedConv


def test_neck_trains(randomise):
    fpn = FPN(
        *([8, 16], 12, 3),
        conv_cfg=dict(type='TShapedConv'),
        norm_cfg=dict(type='BN'),
    )
    convs = {n for n, m in fpn.named_modules() if type(m) is TShapedConv}
    assert convs == {'fpn_convs.0.conv', 'fpn_convs.1.conv'}
    maps = fpn.train()([image(2, 8, 16, 16), image(2, 16, 8, 8)])
    sum(m.square().sum() for m in maps).backward()
    assert all(p.grad.any() for p in fpn.parameters())
