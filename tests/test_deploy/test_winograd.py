import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.testing import assert_close

from fasternet_det import FasterNet
from fasternet_det.deploy import OptimizeHook, optimize, winograd
from fasternet_det.deploy.operators import FusedConv2d

pytestmark = pytest.mark.deploy
TOLERANCE = dict(rtol=0, atol=3e-5)


def seeded(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in shapes
    ]


def convolved(x, weight, bias, activation):
    transformed = winograd.transform(weight.float(), x.shape)
    assert transformed.shape == (36 * len(weight), x.shape[1], 1, 1)
    bias = None if bias is None else bias.float()
    return winograd.convolve(x.float(), transformed, bias, activation).double()


@pytest.mark.parametrize('band', [1, 2**16, 2**17, 2**23])
@pytest.mark.parametrize(
    'shape',
    [
        (1, 5, 8, 8),
        (2, 5, 33, 6),
        (3, 4, 14, 14),
        (9, 4, 14, 14),
        (2, 3, 1, 1),
    ],
)
def test_is_the_convolution(shape, band, monkeypatch):
    """Of one tile at a time, of some rows, of some images, and of all."""
    monkeypatch.setattr(winograd, 'BAND', band)
    x, weight, bias = seeded(shape, (7, shape[1], 3, 3), (7,))
    for some in (bias, None):
        found = convolved(x, weight, some, nn.SiLU())
        expected = F.silu(F.conv2d(x, weight, some, 1, 1))
        assert_close(found, expected, rtol=0, atol=5e-5)
        assert found.is_contiguous(memory_format=torch.channels_last)


def test_rounding():
    """Over 256 channels within 1e-5; the direct one's is 1.3e-6."""
    x, weight = seeded((1, 256, 24, 32), (256, 256, 3, 3))
    expected = F.conv2d(x, weight, None, 1, 1)
    found = convolved(x, weight, None, nn.Identity())
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < 7e-6


def test_all_parts_are_of_one_size(monkeypatch):
    """For any number of regions there are few sizes, so few layouts."""
    monkeypatch.setattr(winograd, 'BAND', 14 * 4 * 36 * 16 * 256)
    shapes = [torch.Size((n, 256, 14, 14)) for n in range(1, 1001)]
    sizes = {winograd.tiles(shape, 256) for shape in shapes}
    assert sizes == {16 * images for images in range(1, 15)}
    sizes = {winograd.tiles(shape, 256) for shape in shapes[13::14]}
    assert sizes == {224}
    assert winograd.tiles(torch.Size((15, 256, 14, 14)), 256) == 16 * 8
    assert winograd.tiles(torch.Size((1, 256, 200, 304)), 256) == 2 * 76
    assert winograd._starts(100, 13) == [0, 13, 26, 39, 52, 65, 78, 87]


@pytest.mark.parametrize(
    'shape, out_channels, least',  # channels from which it is
    [
        ((1, 256, 200, 304), 256, 255),
        ((1, 256, 25, 38), 256, 208),  # some tiles reach over the edge
        ((100, 128, 14, 14), 128, 97),  # a quarter of the tiles is empty
        ((1, 256, 13, 19), 256, 167),  # twenty tiles
        ((1, 128, 13, 19), 128, 68),
        ((1, 256, 7, 10), 256, 0),  # six tiles
        ((1, 64, 200, 304), 256, 64),
        ((1, 256, 200, 304), 36, 36),
    ],
)
def test_where_it_is_faster(shape, out_channels, least, monkeypatch):
    for channels in (72, 88, 100):
        monkeypatch.setattr(winograd, 'LEAST_CHANNELS', channels)
        faster = winograd.wins(torch.Size(shape), out_channels)
        assert faster == (least >= channels)


@torch.no_grad()
def test_fused(monkeypatch):
    """Weights that change are followed."""
    layer = FusedConv2d(nn.Conv2d(128, 128, 3, padding=1), nn.ReLU())
    called = []
    convolve = winograd.convolve
    monkeypatch.setattr(
        winograd, 'convolve', lambda *a: called.append(1) or convolve(*a)
    )
    for size in ((32, 32), (16, 48), (32, 32)):
        x = torch.randn(1, 128, *size)
        expected = F.conv2d(x, layer.weight, layer.bias, 1, 1)
        assert_close(layer(x), expected.relu(), **TOLERANCE)
        assert_close(
            layer.add_relu(x, x), (x + expected.relu()).relu(), **TOLERANCE
        )
        assert_close(
            layer.add_to(x.clone(), x), x + expected.relu(), **TOLERANCE
        )
        layer.weight.mul_(1.5)
    assert len(called) == 9 and len(layer._packed[2]) == 1


@torch.no_grad()
def test_filters_lie_as_each_size_wants(capfd):
    """Else each call lays them out anew, in 0.25 s of 512 channels."""
    layer = FusedConv2d(nn.Conv2d(128, 128, 3, padding=1))
    maps = [torch.randn(1, 128, size, size) for size in (16, 48)]
    threads, mkldnn = torch.get_num_threads(), torch.backends.mkldnn
    torch.set_num_threads(2)  # with more than one, layouts differ
    for x in maps:
        layer(x)
    with mkldnn.verbose(mkldnn.VERBOSE_ON):
        for x in maps:
            layer(x)
    torch.set_num_threads(threads)
    kinds = re.findall(r',exec,cpu,(\w+)', capfd.readouterr().out)
    assert kinds == ['convolution'] * 2


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(stride=2),
        dict(padding=0),
        dict(dilation=2, padding=2),
        dict(groups=2),
        dict(kernel_size=1, padding=0),
        dict(dtype=torch.bfloat16),
        dict(dtype=torch.float64),
    ],
)
@torch.no_grad()
def test_others_are_direct(kwargs, monkeypatch):
    monkeypatch.delattr(winograd, 'convolve')
    conv = dict(in_channels=128, out_channels=128, kernel_size=3, padding=1)
    conv = nn.Conv2d(**{**conv, **kwargs})
    x = torch.randn(1, 128, 32, 32, dtype=conv.weight.dtype)
    tolerance = 0.05 if x.dtype == torch.bfloat16 else 1e-5
    assert_close(FusedConv2d(conv)(x), conv(x), rtol=0, atol=tolerance)


@torch.no_grad()
def test_switch(tamed, monkeypatch):
    """In the last stage of FasterNet-S, 256 channels are convolved."""
    model = tamed(FasterNet('s'))
    x = torch.randn(2, 3, 384, 384)
    expected = model(x)
    for fast in (optimize(model), optimize(model, winograd=False)):
        for a, b in zip(fast(x), expected, strict=True):
            assert (a - b).abs().max() < 1e-5 * b.abs().max()
    monkeypatch.delattr(winograd, 'convolve')
    optimize(model, winograd=False)(x)
    with pytest.raises(AttributeError, match='convolve'):
        optimize(model)(x)
    runner = SimpleNamespace(model=model)
    OptimizeHook(winograd=False).before_test_epoch(runner)
    runner.model(x)
