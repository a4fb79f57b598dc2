"""Configs of FasterNet's relatives build and hold their recipes."""

from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.utils import get_installed_path
from torch import nn

from fasternet_det import (
    ConvAWS2d,
    GGhostRegNet,
    GhostNet,
    SAConv,
    SlotResNet,
    SPConv,
    TShapedConv,
)

CONFIGS = Path(__file__).parents[2] / 'configs'
MMDET = Path(get_installed_path('mmdet'), '.mim', 'configs')
G_GHOST = sorted(CONFIGS.glob('g_ghost_regnet/*_coco.py'))
PLUG_INS = [
    CONFIGS / 'spconv/retinanet_r50-spconv_fpn_1x_coco.py',
    CONFIGS / 'saconv/cascade-rcnn_r50-saconv_fpn_1x_coco.py',
]
MINI = [
    CONFIGS / f'mini/mask-rcnn_{name}_nuclei.py'
    for name in (
        *('g-ghost-regnetx-200MF_fpn', 'g-ghost-regnetx-400MF_fpn'),
        *('r18_fpn', 'r18-spconv_fpn', 'r18-saconv_fpn', 'ghostnet-1.0x_fpn'),
        *('fasternet-t0_fpn-t', 'fasternet-t0_fpn-spconv'),
    )
]
GHOSTNET = sorted(CONFIGS.glob('ghostnet/*_coco.py'))
TSHAPED = sorted(CONFIGS.glob('tshaped/*_coco.py'))
# ImageNet files as their authors' release names them, by RegNetX's names
FILES = {
    '3.2GF': ('032', 'g_ghost_regnet_3.2g_77.8.pth'),
    '4.0GF': ('040', 'g_ghost_regnet_4.0g_78.6.pth'),
    '8.0GF': ('080', 'g_ghost_regnet_8.0g_79.0.pth'),
    '16GF': ('160', 'g_ghost_regnet_16.0g_79.9.pth'),
}


def layers(model, kind):
    return {n for n, m in model.named_modules() if type(m) is kind}


def build(path):
    register_all_modules()
    with torch.device('meta'):
        return MODELS.build(Config.fromfile(path).model)


def without_scope(cfg):
    """A config as it was before mmengine noted whose base it is."""
    if isinstance(cfg, dict):
        return {k: without_scope(v) for k, v in cfg.items() if k != '_scope_'}
    if isinstance(cfg, (list, tuple)):
        return [without_scope(v) for v in cfg]
    return cfg


def test_there_are_all():
    assert {p.stem for p in G_GHOST} == {
        f'{detector}_g-ghost-regnetx-{size}_fpn_1x_coco'
        for detector in ('mask-rcnn', 'retinanet')
        for size in FILES
    }
    assert all(p.is_file() for p in PLUG_INS + MINI)


@pytest.mark.parametrize(
    'path',
    G_GHOST + GHOSTNET + TSHAPED + PLUG_INS + MINI,
    ids=lambda p: p.stem,
)
def test_builds_and_its_neck_fits(path):
    model = build(path)
    with torch.device('meta'):
        maps = model.backbone(torch.empty(2, 3, 96, 64))
        model.neck(maps)
    in_channels = Config.fromfile(path).model.neck.in_channels
    assert [m.shape[1] for m in maps] == in_channels
    if isinstance(model.backbone, (GGhostRegNet, GhostNet)):
        assert model.backbone.out_channels == in_channels


@pytest.mark.parametrize('path', G_GHOST, ids=lambda p: p.stem)
def test_recipe_is_regnetxs(path, monkeypatch):
    monkeypatch.delenv('G_GHOST_IMAGENET', raising=False)
    detector, name = path.stem.split('_')[:2]
    arch, file = FILES[name.removeprefix('g-ghost-regnetx-')]
    cfg = Config.fromfile(path)
    want = Config.fromfile(
        MMDET / f'regnet/{detector}_regnetx-3.2GF_fpn_1x_coco.py'
    )
    for key in (
        *('optim_wrapper', 'param_scheduler', 'train_cfg', 'auto_scale_lr'),
        *('train_dataloader', 'test_dataloader', 'default_hooks'),
    ):
        assert without_scope(cfg[key]) == without_scope(want[key]), key
    backbone = cfg.model.backbone
    assert backbone == dict(
        type='GGhostRegNet',
        arch=arch,
        frozen_stages=want.model.backbone.frozen_stages,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://github.com/huawei-noah/Efficient-AI-Backbones'
            f'/releases/download/g_ghost_regnet/{file}',
        ),
    )
    assert want.model.backbone.norm_eval and build(path).backbone.norm_eval
    preprocessor = cfg.model.data_preprocessor
    assert preprocessor.mean == [123.675, 116.28, 103.53]
    assert preprocessor.std == [58.395, 57.12, 57.375]
    assert preprocessor.bgr_to_rgb


@pytest.mark.parametrize('path', GHOSTNET, ids=lambda p: p.stem)
def test_recipe_of_ghostnet(path, monkeypatch):
    """mmdet's RetinaNet with ResNet-50, FasterNet-T0's RTMDet, but for RGB."""
    monkeypatch.delenv('GHOSTNET_IMAGENET', raising=False)
    cfg = Config.fromfile(path)
    own = {'model', 'custom_imports', 'ghostnet', 'checkpoint', 'sync_bn'}
    base = MMDET / 'retinanet/retinanet_r50_fpn_1x_coco.py'
    if 'rtmdet' in path.stem:
        base = CONFIGS / 'fasternet/rtmdet_fasternet-t0_8xb32-300e_coco.py'
    base = Config.fromfile(base)
    for key in (cfg.keys() | base.keys()) - own:
        assert without_scope(cfg[key]) == without_scope(base[key]), key
    for key in ('neck', 'bbox_head', 'test_cfg', 'train_cfg'):
        ours, theirs = (without_scope(c.model[key]) for c in (cfg, base))
        if key == 'neck':
            for neck in (ours, theirs):
                neck |= dict(in_channels=None, start_level=None)
        assert ours == theirs, key
    preprocessor = cfg.model.data_preprocessor
    assert preprocessor.mean == [123.675, 116.28, 103.53]
    assert preprocessor.std == [58.395, 57.12, 57.375]
    assert preprocessor.bgr_to_rgb
    backbone = cfg.model.backbone
    assert (backbone.type, backbone.out_indices) == ('GhostNet', (4, 6, 8))
    if '1.1x' in path.stem:  # of which there are no weights
        assert backbone.init_cfg is None and backbone.frozen_stages == -1
    else:
        assert backbone.init_cfg.checkpoint == (
            'https://github.com/huawei-noah/Efficient-AI-Backbones/releases/'
            'download/ghostnet_pth/ghostnet_1x.pth'
        )


def test_t_shaped_configs():
    """They are the plain ones, but for the 3x3 convolutions after the
    backbone."""
    for path, places in zip(
        TSHAPED,
        (('neck', 'rpn_head', 'roi_head.mask_head'), ('neck', 'bbox_head')),
        strict=True,
    ):
        cfg = Config.fromfile(path)
        plain_path = CONFIGS / 'fasternet' / path.name.replace('fpn-t', 'fpn')
        plain = Config.fromfile(plain_path)
        assert {k for k in cfg if cfg[k] != plain.get(k)} == {
            'model',
            'conv_cfg',
        }
        models = build(path), build(plain_path)
        replaced = layers(models[0], TShapedConv)
        assert {
            place for name in replaced for place in places if place in name
        } == set(places)
        # What else is 3x3: what predicts.
        kept = {
            name
            for name, m in models[0].named_modules()
            if isinstance(m, nn.Conv2d)
            and m.kernel_size == (3, 3)
            and not name.startswith('backbone')
            and 'partial_conv3' not in name
        }
        plain3x3 = {
            name
            for name, m in models[1].named_modules()
            if isinstance(m, nn.Conv2d)
            and m.kernel_size == (3, 3)
            and not name.startswith('backbone')
        }
        assert replaced | kept == plain3x3
        assert kept == (
            {'bbox_head.retina_cls', 'bbox_head.retina_reg'}
            if 'retinanet' in path.stem
            else set()
        )


def test_spread_of_t_shaped_towers():
    """At the start, they give predictors maps like a plain tower's."""
    spreads = []
    for path in (
        TSHAPED[1],
        CONFIGS / 'fasternet/retinanet_fasternet-t0_fpn_1x_coco.py',
    ):
        register_all_modules()
        torch.manual_seed(0)
        head = MODELS.build(Config.fromfile(path).model.bbox_head)
        head.init_weights()
        bias = head.retina_cls.bias
        assert torch.allclose(bias.sigmoid(), torch.full_like(bias, 0.01))
        x = torch.randn(1, 256, 32, 32)
        with torch.no_grad():
            for conv in head.cls_convs:
                x = conv(x)
        spreads.append(x.std().item())
    assert 0.3 < spreads[0] / spreads[1] < 3


def test_rpn_of_several_convolutions_is_refused():
    cfg = dict(
        type='SlotRPNHead',
        in_channels=8,
        num_convs=2,
        conv_cfg=dict(type='TShapedConv'),
    )
    with pytest.raises(ValueError, match='num_convs=2, expected 1'):
        MODELS.build(cfg)


def test_spconv():
    model = build(PLUG_INS[0])
    convs = layers(model, SPConv)
    assert len(convs) == 16 and all(n.endswith('.conv2') for n in convs)


def test_saconv():
    model = build(PLUG_INS[1])
    convs = layers(model.backbone, SAConv)
    assert len(convs) == 4 + 6 + 3
    assert all(n[:6] in ('layer2', 'layer3', 'layer4') for n in convs)
    assert len(layers(model.backbone, ConvAWS2d)) == 1 + 52 - 13
    # SAConv's own small ones are not of that class.
    assert not layers(model.backbone, nn.Conv2d)


def test_mini_plug_ins():
    plain, spconv, saconv = (build(path) for path in MINI[2:5])
    convs = {
        n
        for n, m in plain.backbone.named_modules()
        if n.startswith('layer') and n[-5:] in ('conv1', 'conv2')
    }
    assert len(convs) == 16
    assert layers(spconv.backbone, SPConv) == convs
    assert layers(saconv.backbone, SAConv) == {
        n for n in convs if not n.startswith('layer1')
    }
    for model in (plain, spconv, saconv):
        assert type(model.backbone) is SlotResNet
        # From scratch, nothing is frozen.
        assert all(p.requires_grad for p in model.parameters())
