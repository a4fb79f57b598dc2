import copy
import pickle

import numpy as np
import pytest
import torch
from fill import fill_input
from mmcv.cnn import ConvAWS2d as MMCVConvAWS2d
from mmcv.cnn import ConvModule, build_conv_layer
from mmcv.ops import SAConv2d
from mmdet.models.backbones import DetectoRS_ResNet, ResNet
from mmdet.models.dense_heads import RetinaHead
from mmdet.models.necks import FPN
from mmengine.registry import MODELS, DefaultScope
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fasternet_det import ConvAWS2d, SAConv, SlotResNet

SIDE = ('switch', 'pre_context', 'post_context')


def image(*shape, seed=0):
    return torch.from_numpy(fill_input(seed, shape))


@pytest.fixture
def sized(randomise):
    """Randomise a module, with scales that keep its outputs near 1."""

    def fill(module):
        randomise(module)
        for layer in module.modules():
            if isinstance(layer, ConvAWS2d):
                fan_in = layer.weight[0].numel()
                layer.weight_gamma.copy_(layer.weight_gamma.abs() + 0.5)
                layer.weight_gamma /= fan_in**0.5
                layer.weight_beta /= fan_in**0.5
        return module

    return fill


def close(a, b, tolerance=1e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize('use_deform', [False, True])
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('dilation', [1, 2])
@pytest.mark.parametrize('groups', [1, 2])
def test_equals_mmcvs(stride, dilation, groups, use_deform, sized):
    kwargs = dict(
        kernel_size=3,
        stride=stride,
        padding=dilation,
        dilation=dilation,
        groups=groups,
        bias=False,
        use_deform=use_deform,
    )
    ours = sized(SAConv(6, 8, **kwargs))
    theirs = SAConv2d(6, 8, **kwargs)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = image(2, 6, 11, 14)
    close(ours(x), theirs(x))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    shapes = {k: v.shape for k, v in theirs.state_dict().items()}
    assert {k: v.shape for k, v in ours.state_dict().items()} == shapes
    # The larger dilation, the switch and the contexts matter.
    for name in ('weight_diff', *(f'{side}.weight' for side in SIDE)):
        other = copy.deepcopy(ours)
        nn.init.zeros_(other.get_parameter(name))
        assert (other(x) - ours(x)).abs().max() > 0.01, name


def test_gradients_equal_mmcvs(sized):
    ours = sized(SAConv(6, 8, 3, 2, 1, bias=False))
    theirs = SAConv2d(6, 8, 3, 2, 1, bias=False)
    theirs.load_state_dict(ours.state_dict())
    x = image(2, 6, 11, 14)
    for conv in (ours, theirs):
        conv(x).pow(3).sum().backward()
    theirs = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        close(parameter.grad, theirs[name].grad, 1e-4)


@pytest.mark.parametrize('bias', [True, False])
def test_aws_equals_mmcvs(bias, sized):
    kwargs = dict(kernel_size=3, stride=2, padding=2, dilation=2, bias=bias)
    ours = sized(ConvAWS2d(6, 8, groups=2, **kwargs))
    theirs = MMCVConvAWS2d(6, 8, groups=2, **kwargs)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = image(2, 6, 11, 14)
    close(ours(x), theirs(x))


LAYERS = [
    (ConvAWS2d, {}),
    (SAConv, {}),
    (SAConv, dict(use_deform=True)),
]


@pytest.mark.parametrize('layer, kwargs', LAYERS)
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('stride, dilation', [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_plain_weights_give_the_plain_convolution(
    layer, kwargs, bias, stride, dilation, sized
):
    plain = nn.Conv2d(6, 8, 3, stride, dilation, dilation, bias=bias)
    x = image(2, 6, 11, 14)
    fresh = layer(6, 8, 3, stride, dilation, dilation, bias=bias, **kwargs)
    trained = sized(copy.deepcopy(fresh))
    for conv in (fresh, trained):
        weights = plain.state_dict()
        names = list(weights)
        conv.load_state_dict(weights, strict=True)
        assert list(weights) == names  # the caller's dict stays
        close(conv(x), plain(x))


@pytest.mark.parametrize('layer, kwargs', LAYERS)
def test_starts_as_a_plain_convolution(layer, kwargs):
    torch.manual_seed(0)
    conv = layer(6, 8, 3, padding=1, **kwargs)
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 8, 3, padding=1)
    x = image(2, 6, 11, 14)
    close(conv(x), plain(x))


@pytest.mark.parametrize('layer, kwargs', LAYERS)
def test_a_round_trip_is_exact(layer, kwargs, sized, tmp_path):
    conv = sized(layer(6, 8, 3, padding=1, **kwargs))
    conv.weight_gamma.mul_(-1)  # as a folded norm may leave it
    torch.save(conv.state_dict(), tmp_path / 'a.pth')
    other = layer(6, 8, 3, padding=1, **kwargs)
    other.load_state_dict(torch.load(tmp_path / 'a.pth', weights_only=True))
    for name, value in other.state_dict().items():
        assert torch.equal(value, conv.state_dict()[name]), name
    x = image(2, 6, 11, 14)
    for copied in (
        other,
        copy.deepcopy(conv),
        pickle.loads(pickle.dumps(conv)),
    ):
        assert torch.equal(copied(x), conv(x))


def test_what_is_missing_is_named():
    conv = SAConv(6, 8, 3, padding=1)
    full = conv.state_dict()
    for name in (
        *('weight', 'bias', 'weight_gamma', 'weight_beta', 'weight_diff'),
        'switch.bias',
    ):
        partial = {k: v for k, v in full.items() if k != name}
        with pytest.raises(RuntimeError, match=f'Missing.*"{name}"'):
            conv.load_state_dict(partial)
    with pytest.raises(RuntimeError, match='size mismatch for weight:'):
        conv.load_state_dict(nn.Conv2d(6, 9, 3).state_dict())


def test_half_precision_weights():
    plain = nn.Conv2d(6, 8, 3, padding=1).half()
    conv = SAConv(6, 8, 3, padding=1)
    conv.load_state_dict(plain.state_dict())
    x = image(2, 6, 11, 14)
    close(conv(x), plain.float()(x))


def test_bias_is_honoured(sized):
    """As that of the convolutions: the post-context sees it."""
    conv = sized(SAConv(6, 8, 3, padding=1)).double()
    x = image(2, 6, 11, 14).double()
    out = conv(x)
    bias = conv.bias.detach().clone()
    nn.init.zeros_(conv.bias)
    context = conv.post_context.weight[:, :, 0, 0] @ bias
    close(out, conv(x) + (bias + context)[:, None, None], 1e-12)


@pytest.mark.parametrize('use_deform', [False, True])
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('size', [(1, 1), (2, 2), (1, 7), (2, 1), (5, 2)])
def test_small_maps(size, stride, use_deform, sized):
    """The switch sees them reflected as often as it takes."""
    conv = sized(SAConv(6, 8, 3, stride, 1, use_deform=use_deform)).double()
    x = image(2, 6, *size).double()
    out = conv(x)
    assert out.shape == nn.Conv2d(6, 8, 3, stride, 1).double()(x).shape
    if use_deform:
        assert out.isfinite().all()
        return
    x = x + conv.pre_context(x.mean((2, 3), keepdim=True))
    pads = ((0, 0), (0, 0), (2, 2), (2, 2))
    smooth = torch.nn.functional.avg_pool2d(
        torch.from_numpy(np.pad(x.detach(), pads, mode='reflect')), 5, 1
    )
    weight = conv.switch.weight
    switch = torch.nn.functional.conv2d(
        smooth, weight, conv.switch.bias, stride
    )
    weight = conv.standardised_weight()
    out_s, out_l = (
        torch.nn.functional.conv2d(x, w, conv.bias, stride, d, d)
        for w, d in ((weight, 1), (weight + conv.weight_diff, 3))
    )
    mixed = switch * out_s + (1 - switch) * out_l
    mixed = mixed + conv.post_context(mixed.mean((2, 3), keepdim=True))
    close(out, mixed, 1e-12)


def test_small_deformable_map_is_a_large_one_with_zeros(sized):
    conv = sized(SAConv(6, 8, 3, padding=1, use_deform=True)).double()
    small, offset = image(1, 6, 2, 1).double(), image(1, 18, 2, 1).double()
    pad = (0, 4, 0, 4)
    large, far = (
        torch.nn.functional.pad(value, pad) for value in (small, offset)
    )
    weight = conv.standardised_weight()
    want = conv._atrous(large, weight, 3, far)[..., :2, :1]
    close(conv._atrous(small, weight, 3, offset), want, 1e-12)


def test_geometry_is_never_changed(sized):
    conv = sized(SAConv(6, 8, 3, 2, 2, 2))
    with pytest.raises(RuntimeError):
        conv(image(1, 5, 8, 8))  # in the middle of which mmcv's is changed
    conv(image(1, 6, 8, 8))
    assert (conv.stride, conv.padding, conv.dilation) == ((2, 2),) * 3


@pytest.mark.parametrize('use_deform', [False, True])
def test_all_parameters_get_gradients(use_deform, sized):
    """At the start too, though there weight_diff's is zero."""
    conv = SAConv(6, 8, 3, padding=1, use_deform=use_deform)
    conv(image(2, 6, 11, 14)).pow(3).sum().backward()
    for name, parameter in conv.named_parameters():
        assert parameter.grad is not None, name
    conv.zero_grad()
    sized(conv)(image(2, 6, 11, 14)).pow(3).sum().backward()
    for name, parameter in conv.named_parameters():
        assert parameter.grad.any(), name


def neutral(conv):
    """Whether the switch and the contexts are as they start."""
    return all(
        (getattr(conv, side).weight == 0).all()
        and (getattr(conv, side).bias == float(side == 'switch')).all()
        for side in SIDE
    )


def backbone(kind, **kwargs):
    stages = (False, False, False, True)
    sac = dict(type='SAConv', use_deform=True)
    if kind == 'DetectoRS':
        return DetectoRS_ResNet(
            depth=50, sac=sac, stage_with_sac=stages, **kwargs
        )
    resnet = {'ResNet-50': (ResNet, 50), 'SlotResNet-18': (SlotResNet, 18)}
    layer, depth = resnet[kind]
    return layer(depth, dcn=sac, stage_with_dcn=stages, **kwargs)


@pytest.mark.parametrize('kind', ['DetectoRS', 'ResNet-50', 'SlotResNet-18'])
def test_initialisation_of_a_backbone_spares_the_side_branches(kind):
    model = backbone(kind)
    model.init_weights()
    layers = [m for m in model.modules() if isinstance(m, SAConv)]
    assert len(layers) == (4 if '18' in kind else 3)
    for layer in layers:
        assert neutral(layer)
        assert not layer.offset_s.weight.any()
        assert not layer.offset_l.bias.any()


@pytest.mark.parametrize('kind', ['DetectoRS', 'ResNet-50'])
def test_torchvisions_resnet_loads(kind, randomise, tmp_path):
    plain = randomise(ResNet(50))
    torch.save(plain.state_dict(), tmp_path / 'resnet50.pth')
    kwargs = dict(conv_cfg=dict(type='ConvAWS2d')) if kind[0] == 'D' else {}
    model = backbone(
        kind,
        init_cfg=dict(
            type='Pretrained', checkpoint=str(tmp_path / 'resnet50.pth')
        ),
        **kwargs,
    )
    model.init_weights()
    model.eval(), plain.eval()
    assert isinstance(model.conv1, ConvAWS2d) == (kind == 'DetectoRS')
    x = image(1, 3, 64, 64)
    for a, b in zip(model(x), plain(x), strict=True):
        close(a, b, 1e-4)


def test_initialisation_of_a_neck_and_a_head_spares_the_side_branches():
    """ConvModule's and Conv2d's initialisers reach but the weight."""
    cfg = dict(type='SAConv')
    neck = FPN([16, 32], 8, 4, add_extra_convs='on_input', conv_cfg=cfg)
    head = RetinaHead(2, 8, stacked_convs=2, feat_channels=8, conv_cfg=cfg)
    for module in (neck, head):
        module.init_weights()
        layers = [m for m in module.modules() if isinstance(m, SAConv)]
        assert layers and all(neutral(layer) for layer in layers)
    maps = neck((image(2, 16, 13, 18), image(2, 32, 7, 9)))
    scores, boxes = head(maps)
    assert [s.shape[2:] for s in scores] == [(13, 18), (7, 9), (4, 5), (2, 3)]
    sum(m.square().sum() for m in (*scores, *boxes)).backward()
    for module in (neck, head):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name


@pytest.mark.parametrize('scope', ['mmdet', 'mmengine', 'mmcv', 'mmpretrain'])
@pytest.mark.parametrize('layer', [SAConv, ConvAWS2d])
def test_every_scope_finds_it(scope, layer):
    name = layer.__name__
    assert MODELS.get(name) is layer
    with DefaultScope.overwrite_default_scope(scope):
        assert type(build_conv_layer(dict(type=name), 8, 8, 1)) is layer


def test_mmcvs_names_are_mmcvs():
    assert MODELS.get('SAC') is SAConv2d
    assert MODELS.get('ConvAWS') is MMCVConvAWS2d


def test_conv_module_reads_what_it_needs():
    cfg = dict(type='SAConv')
    ours = ConvModule(8, 6, 3, stride=2, padding=1, conv_cfg=cfg)
    plain = ConvModule(8, 6, 3, stride=2, padding=1)
    for name in (
        *('in_channels', 'out_channels', 'kernel_size', 'stride', 'padding'),
        *('dilation', 'transposed', 'output_padding', 'groups'),
    ):
        assert getattr(ours, name) == getattr(plain, name), name


@pytest.mark.parametrize(
    'kwargs, named',
    [
        (dict(kernel_size=3), 'padding=0 for kernel_size=3'),
        (dict(kernel_size=3, padding=1, dilation=2), 'padding=1 .*dilation=2'),
        (dict(kernel_size=2, padding=1), 'kernel_size=2.* an odd kernel_size'),
        (dict(kernel_size=3, padding='same'), "padding='same'"),
        (
            dict(kernel_size=5, padding=2, use_deform=True),
            'use_deform=True for kernel_size=5',
        ),
        (dict(in_channels=1, kernel_size=1), 'filters of one value'),
    ],
)
def test_what_it_cannot_serve(kwargs, named):
    kwargs = dict(in_channels=8, out_channels=6) | kwargs
    with pytest.raises(ValueError, match=f'SAConv got .*{named}'):
        SAConv(**kwargs)


def test_aws_of_one_value():
    with pytest.raises(ValueError, match='ConvAWS2d got filters of one value'):
        ConvAWS2d(8, 8, 1, groups=8)


@pytest.mark.deploy
def test_exports(sized):
    conv = sized(SAConv(6, 8, 3, 2, 1)).eval()
    dims = {i: torch.export.Dim.AUTO for i in (0, 2, 3)}
    program = torch.export.export(
        conv, (image(2, 6, 9, 12),), dynamic_shapes=(dims,)
    )
    x = image(3, 6, 14, 7)
    torch.testing.assert_close(program.module()(x), conv(x))


def test_the_switch_costs_little():
    """Smoothing one channel gives what smoothing all would."""
    conv = SAConv(64, 64, 3, padding=1)
    with FlopCounterMode(display=False) as counter:
        conv(image(1, 64, 32, 32))
    convs = 2 * 64 * 64 * 9 * 32 * 32
    assert counter.get_total_flops() / 2 < 1.01 * convs
