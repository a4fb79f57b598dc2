"""What has no faster form, or another one, computes as it does."""

import pytest
import torch
from fill import fill_input
from mmcv.cnn import ConvModule
from torch import nn

from fasternet_det import FasterNet, GGhostRegNet
from fasternet_det.deploy import optimize
from fasternet_det.deploy.operators import FusedConv2d, FusedUpsample

pytestmark = pytest.mark.deploy
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
    kinds = (FusedConv2d, FusedUpsample)
    found = {m for m in fast.modules() if isinstance(m, kinds)}
    assert len(found) == count


@torch.no_grad()
@pytest.mark.parametrize('build', [FasterNet, GGhostRegNet])
def test_blocks_with_other_norms(build, tamed):
    """These are not folded, so that blocks compute step by step."""
    arch = dict(embed_dim=8, depths=(1, 1, 1, 1), act_cfg=dict(type='ReLU'))
    if build is GGhostRegNet:
        arch = TINY
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
