"""Configs of G-Ghost, SPConv and SAConv build and hold their recipes."""

from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.utils import get_installed_path
from torch import nn

from fasternet_det import ConvAWS2d, GGhostRegNet, SAConv, SlotResNet, SPConv

CONFIGS = Path(__file__).parents[2] / 'configs'
MMDET = Path(get_installed_path('mmdet'), '.mim', 'configs')
G_GHOST = sorted(CONFIGS.glob('g_ghost_regnet/*_coco.py'))
PLUG_INS = [
    CONFIGS / 'spconv/retinanet_r50-spconv_fpn_1x_coco.py',
    CONFIGS / 'saconv/cascade-rcnn_r50-saconv_fpn_1x_coco.py',
]
MINI = [
    CONFIGS / f'mini/mask-rcnn_{name}_fpn_nuclei.py'
    for name in (
        *('g-ghost-regnetx-200MF', 'g-ghost-regnetx-400MF'),
        *('r18', 'r18-spconv', 'r18-saconv'),
    )
]
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
    'path', G_GHOST + PLUG_INS + MINI, ids=lambda p: p.stem
)
def test_builds_and_its_neck_fits(path):
    model = build(path)
    with torch.device('meta'):
        maps = model.backbone(torch.empty(2, 3, 96, 64))
        model.neck(maps)
    in_channels = Config.fromfile(path).model.neck.in_channels
    assert [m.shape[1] for m in maps] == in_channels
    if isinstance(model.backbone, GGhostRegNet):
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
    plain, spconv, saconv = (build(path) for path in MINI[2:])
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
