import copy

import pytest
import torch
from fill import fill_input
from mmcv.cnn import ConvModule, fuse_conv_bn
from mmdet.models.backbones import DetectoRS_ResNet, ResNet, ResNetV1d
from mmdet.models.dense_heads import RetinaHead
from mmdet.models.necks import FPN
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.utils import get_installed_path
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fasternet_det import (
    ConvAWS2d,
    GGhostRegNet,
    GhostNet,
    SAConv,
    SlotResNet,
    SPConv,
    TShapedConv,
)
from fasternet_det.deploy import fold
from fasternet_det.deploy.fold_layers import FoldedSAConv, FoldedSPConv

TINY = dict(depths=(2, 3, 4, 2), widths=(8, 16, 24, 32), group_width=8)
DTYPES = pytest.mark.parametrize(
    'dtype, tolerance', [('double', 1e-12), ('float', 1e-5)]
)


def image(*shape):
    return torch.from_numpy(fill_input(0, shape))


def norms(model):
    return [n for n, m in model.named_modules() if isinstance(m, _BatchNorm)]


def close(a, b, tolerance):
    for x, y in zip(a, b, strict=True):
        assert x.shape == y.shape
        assert (x - y).abs().max() <= tolerance * y.abs().max()


LAYERS = [
    dict(type='SPConv', alpha=0.25),
    dict(type='TShapedConv'),
    dict(type='SAConv'),
    dict(type='SAConv', use_deform=True),
    dict(type='ConvAWS2d'),
]


@DTYPES
@pytest.mark.parametrize('conv_cfg', LAYERS)
@pytest.mark.parametrize('norm_cfg', [dict(type='BN'), None])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('size', [(8, 12), (9, 7)])
@pytest.mark.filterwarnings('ignore:Unnecessary conv bias')
def test_layer(
    conv_cfg, norm_cfg, bias, stride, size, dtype, tolerance, tamed
):
    module = ConvModule(
        *(8, 6, 3, stride, 1), bias=bias, conv_cfg=conv_cfg, norm_cfg=norm_cfg
    )
    module = getattr(tamed(module), dtype)()
    before = copy.deepcopy(module.state_dict())
    x = getattr(image(2, 8, *size), dtype)()
    deformable = conv_cfg.get('use_deform', False)
    folded = fold(module)
    close([folded(x)], [module(x)], tolerance)
    assert norms(folded) == []
    assert not any(p.requires_grad for p in folded.parameters())
    assert type(folded.conv) is dict(
        SPConv=FoldedSPConv,
        TShapedConv=TShapedConv,
        SAConv=SAConv if deformable else FoldedSAConv,
        ConvAWS2d=nn.Conv2d,
    ).get(conv_cfg['type'])
    for name, value in module.state_dict().items():  # untouched
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    'conv_cfg', [c for c in LAYERS if c['type'] != 'TShapedConv']
)
def test_mmcvs_folding_is_wrong(conv_cfg, tamed):
    """Which is why this one exists: on SPConv it fails or changes values."""
    module = ConvModule(
        8, 6, 3, padding=1, conv_cfg=conv_cfg, norm_cfg=dict(type='BN')
    )
    module = tamed(module).double()
    x = image(2, 8, 8, 12).double()
    theirs = fuse_conv_bn(copy.deepcopy(module))(x)
    assert (theirs - module(x)).abs().max() > 0.1


def test_folded_deformable_saconv_keeps_its_names(tamed):
    cfg = dict(type='SAConv', use_deform=True)
    module = ConvModule(
        *(8, 6, 3), padding=1, conv_cfg=cfg, norm_cfg=dict(type='BN')
    )
    folded = fold(tamed(module).double())
    other = SAConv(8, 6, 3, padding=1, bias=False, use_deform=True).double()
    other.load_state_dict(folded.conv.state_dict(), strict=True)
    x = image(2, 8, 9, 7).double()
    close([other(x)], [folded.conv(x)], 0)


@pytest.mark.deploy  # torch 2.1 has no convolution of float16 on CPUs
@pytest.mark.parametrize('kind', ['SPConv', 'SAConv'])
def test_half_precision(kind, tamed):
    """Where 1 / scale is beyond float16, too."""
    module = ConvModule(
        *(8, 6, 3),
        padding=1,
        conv_cfg=dict(type=kind),
        norm_cfg=dict(type='BN'),
    )
    tamed(module).bn.weight.data[2:4] = 1e-8
    if kind == 'SAConv':  # or its post-context has to scale that back
        module.conv.post_context.weight.data.zero_()
    x = image(2, 8, 9, 7)
    close([fold(module).half()(x.half()).float()], [module(x)], 0.02)


def test_norms_without_parameters_or_statistics(randomise):
    x = image(2, 8, 9, 7).double()
    norm_cfg = dict(type='BN', affine=False)
    plain = randomise(SPConv(8, 6, 3, norm_cfg=norm_cfg)).eval().double()
    close([fold(plain)(x)], [plain(x)], 1e-12)
    norm_cfg = dict(type='BN', track_running_stats=False)
    plain = randomise(SPConv(8, 6, 3, norm_cfg=norm_cfg)).eval().double()
    folded = fold(plain)
    assert norms(folded) == ['bn1', 'bn2']
    close([folded(x)], [plain(x)], 0)


@pytest.mark.parametrize('kind', [SPConv, TShapedConv, SAConv, ConvAWS2d])
def test_shared_layers_stay_shared(kind, tamed):
    layer = tamed(kind(8, 8, 3, padding=1)).double()
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.Sequential(layer)).eval()
    folded = fold(model)
    x = image(2, 8, 9, 7).double()
    close([folded(x)], [model(x)], 1e-12)
    assert folded[0] is folded[2] is folded[3][0] is not layer


@pytest.mark.parametrize(
    'kind', ['SPConv', 'TShapedConv', 'ConvAWS2d', 'SAConv']
)
@pytest.mark.parametrize('scale', [0, 1e-43, 1e-20])
@DTYPES
def test_norm_that_scales_by_next_to_nothing(
    kind, scale, dtype, tolerance, tamed
):
    module = ConvModule(
        *(8, 6, 3),
        padding=1,
        conv_cfg=dict(type=kind),
        norm_cfg=dict(type='BN'),
        act_cfg=None,
    )
    module = getattr(tamed(module), dtype)()
    module.bn.weight.data[2] = scale
    if kind == 'SAConv' and (scale == 0 or scale < 1e-40 and dtype == 'float'):
        folded = fold(module)
        assert norms(folded) == ['bn']
        x = getattr(image(2, 8, 9, 7), dtype)()
        close([folded(x)], [module(x)], tolerance)
        context = module.conv.post_context.weight.data
        context[[0, 1, 3, 4, 5], 2] = 0  # all that reads the channel
    folded = fold(module)
    x = getattr(image(2, 8, 9, 7), dtype)()
    close([folded(x)], [module(x)], tolerance)
    close([folded(x)[:, 2]], [module.bn.bias[2].expand(2, 9, 7)], tolerance)


def test_groups(tamed):
    for kind in (ConvAWS2d, SAConv):
        conv = tamed(kind(8, 6, 3, 2, 2, 2, groups=2))
        model = ConvModule(8, 6, 3, norm_cfg=dict(type='BN'))
        model.conv = conv
        tamed(model).double()
        x = image(2, 8, 9, 7).double()
        close([fold(model)(x)], [model(x)], 1e-12)


def test_layers_alone(tamed):
    """Bare ones, and those in a container that declares no pairs."""
    x = image(2, 8, 9, 7).double()
    for kind in (SPConv, SAConv, ConvAWS2d):
        layer = kind(8, 8, 3, padding=1)
        model = nn.Sequential(layer, nn.ReLU(), copy.deepcopy(layer))
        for module in (tamed(layer).double(), tamed(model).double()):
            folded = fold(module)
            assert not any(type(m) is kind for m in folded.modules())
            close([folded(x), fold(folded)(x)], [module(x)] * 2, 1e-12)


@DTYPES
@pytest.mark.parametrize('arch', ['002', '032', TINY], ids=str)
def test_g_ghost_regnet(arch, dtype, tolerance, tamed):
    model = getattr(tamed(GGhostRegNet(arch)), dtype)()
    folded = fold(model)
    x = getattr(image(2, 3, 70, 101), dtype)()
    close(folded(x), model(x), tolerance)
    assert norms(folded) == []


@DTYPES
@pytest.mark.parametrize('fork_feat', [True, False])
def test_ghostnet(fork_feat, dtype, tolerance, tamed):
    model = GhostNet(0.5, out_indices=(0, 2, 4, 7, 9), fork_feat=fork_feat)
    model = getattr(tamed(model), dtype)()
    x = getattr(image(2, 3, 64, 75), dtype)()
    folded = fold(model)
    assert norms(folded) == []
    if fork_feat:
        close(folded(x), model(x), tolerance)
    else:
        close([folded(x)], [model(x)], tolerance)


def test_g_ghost_classifier(tamed):
    model = tamed(GGhostRegNet(TINY, fork_feat=False)).double()
    folded = fold(model)
    x = image(2, 3, 64, 64).double()
    close([folded(x)], [model(x)], 1e-12)
    assert norms(folded) == []


@pytest.mark.parametrize(
    'backbone, kwargs',
    [
        (ResNet, dict(depth=50, style='caffe')),
        (ResNetV1d, dict(depth=50)),
        (SlotResNet, dict(depth=18)),
        (SlotResNet, dict(depth=50)),
    ],
)
@pytest.mark.parametrize(
    'dcn', [dict(type='SPConv', alpha=0.5), dict(type='SAConv')]
)
def test_resnet(backbone, kwargs, dcn, tamed):
    model = tamed(
        backbone(
            base_channels=8,
            dcn=dcn,
            stage_with_dcn=(False, True, True, True),
            **kwargs,
        )
    ).double()
    folded = fold(model)
    x = image(2, 3, 70, 101).double()
    close(folded(x), model(x), 1e-10)  # through 50 random layers
    assert norms(folded) == []


def test_detectors_resnet(tamed):
    model = tamed(
        DetectoRS_ResNet(
            depth=50,
            base_channels=8,
            conv_cfg=dict(type='ConvAWS2d'),
            sac=dict(type='SAConv'),
            stage_with_sac=(False, True, True, True),
        )
    ).double()
    folded = fold(model)
    x = image(2, 3, 70, 101).double()
    close(folded(x), model(x), 1e-10)
    assert norms(folded) == []
    assert not any(type(m) is ConvAWS2d for m in folded.modules())


def test_neck_and_head(tamed):
    """Of a detector whose backbone is plain."""
    register_all_modules()
    path = f'{get_installed_path("mmdet")}/.mim/configs/retinanet/'
    cfg = Config.fromfile(path + 'retinanet_r18_fpn_1x_coco.py').model
    norm_cfg = dict(type='BN')
    cfg.neck.update(conv_cfg=dict(type='ConvAWS2d'), norm_cfg=norm_cfg)
    cfg.bbox_head.update(conv_cfg=dict(type='SPConv'), norm_cfg=norm_cfg)
    for part in (cfg.neck, cfg.bbox_head):
        part.update({k: 16 for k in ('out_channels',) if k in part})
    cfg.bbox_head.update(in_channels=16, feat_channels=16)
    cfg.backbone.pop('init_cfg')
    model = MODELS.build(cfg)
    tamed(model).double()
    assert isinstance(model.neck, FPN)
    assert isinstance(model.bbox_head, RetinaHead)
    folded = fold(model)
    x = image(2, 3, 96, 64).double()
    maps = model.extract_feat(x)
    close(folded.extract_feat(x), maps, 1e-11)
    for a, b in zip(folded.bbox_head(maps), model.bbox_head(maps)):
        close(a, b, 1e-11)
    assert norms(folded) == []


@pytest.mark.parametrize('kind', ['SAC', 'ConvAWS', 'ConvWS'])
def test_mmcvs_layers_stay(kind, tamed, log):
    model = ResNet(
        50,
        base_channels=8,
        dcn=dict(type=kind),
        stage_with_dcn=(False, False, False, True),
    )
    model.layer1[0].conv3 = ConvAWS2d(8, 32, 1, bias=False)
    tamed(model)
    if kind == 'ConvAWS':  # mmcv's, not ours
        for block in model.layer4:
            block.conv2.weight_gamma.fill_(0.1)
    folded = fold(model)
    left = [f'layer4.{i}.bn2' for i in range(3)]
    assert norms(folded) == left
    assert log() == [
        'fold: 3 norms stay, as nothing declares what is before them, or it '
        f'cannot take them: {", ".join(left)}'
    ]
    x = image(1, 3, 160, 128)
    close(folded(x), model(x), 1e-5)


def test_layers_with_other_norms_stay(tamed):
    conv = SPConv(8, 8, 3, norm_cfg=dict(type='GN', num_groups=2))
    model = tamed(nn.ModuleDict(dict(a=conv, b=ConvAWS2d(8, 8, 3))))
    folded = fold(model)
    assert type(folded['a']) is SPConv
    assert type(folded['b']) is nn.Conv2d
    x = image(1, 8, 6, 6)
    for name in 'ab':
        close([folded[name](x)], [model[name](x)], 1e-5)


@torch.no_grad()
def test_saconv_before_a_norm_of_zero(tamed):
    """As residual blocks start: what is nothing need not be scaled back."""
    cfgs = dict(conv_cfg=dict(type='SAConv'), norm_cfg=dict(type='BN'))
    module = tamed(ConvModule(6, 4, 3, padding=1, **cfgs)).double()
    module.conv.post_context.weight.zero_()
    module.norm.weight[0] = 0
    folded = fold(module)
    assert norms(folded) == []
    x = torch.randn(2, 6, 9, 7, dtype=torch.double)
    close([folded(x)], [module(x)], 1e-12)
