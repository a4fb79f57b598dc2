"""Every config builds, fits its neck and holds the recipe it claims."""

from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper

CONFIGS = Path(__file__).parents[2] / 'configs'
LR_DECAY = CONFIGS / 'fasternet/mask-rcnn_fasternet-s_fpn_lr-decay-1x_coco.py'
COCO = sorted({*CONFIGS.glob('fasternet/*_coco.py')} - {LR_DECAY})
MINI = sorted(CONFIGS.glob('mini/*_fasternet-*_nuclei*.py'))
RTMDET = [p for p in COCO if p.stem.startswith('rtmdet')]
DROP_PATH = dict(t0=0.0, t1=0.02, t2=0.05, s=0.15, m=0.2, l=0.3)
# ImageNet files as their authors' release names them
FILES = dict(
    t0='fasternet_t0-epoch.281-val_acc1.71.9180.pth',
    t1='fasternet_t1-epoch.291-val_acc1.76.2180.pth',
    t2='fasternet_t2-epoch.289-val_acc1.78.8860.pth',
    s='fasternet_s-epoch.299-val_acc1.81.2840.pth',
    m='fasternet_m-epoch.291-val_acc1.82.9620.pth',
    l='fasternet_l-epoch.299-val_acc1.83.5060.pth',
)


def arch_of(path):
    return path.stem.split('fasternet-')[1].split('_')[0]


def test_there_are_all():
    assert {p.stem for p in COCO} == {
        f'{detector}_fasternet-{arch}_fpn_1x_coco'
        for detector in ('mask-rcnn', 'retinanet')
        for arch in FILES
    } | {
        f'rtmdet_fasternet-{arch}_8xb32-300e_coco'
        for arch in ('t0', 't1', 't2')
    }


@pytest.mark.parametrize('path', COCO + MINI, ids=lambda p: p.stem)
def test_builds_and_its_neck_fits(path):
    register_all_modules()
    cfg = Config.fromfile(path)
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
        maps = model.backbone(
            torch.empty(1, model.backbone.in_channels, 96, 64)
        )
        model.neck(maps)
    assert type(model.backbone).__name__ == 'FasterNet'
    assert model.backbone.out_channels == cfg.model.neck.in_channels
    assert [m.shape[1] for m in maps] == model.backbone.out_channels


@pytest.mark.parametrize('path', COCO, ids=lambda p: p.stem)
def test_backbone_and_images(path, monkeypatch):
    monkeypatch.delenv('FASTERNET_IMAGENET', raising=False)
    cfg, arch = Config.fromfile(path), arch_of(path)
    backbone = cfg.model.backbone
    assert backbone.arch == arch
    assert backbone.get('drop_path_rate', 0.0) == DROP_PATH[arch]
    assert backbone.init_cfg.checkpoint == (
        'https://github.com/JierunChen/FasterNet/releases/download/v1.0/'
        + FILES[arch]
    )
    assert backbone.keys() - {
        'type',
        'arch',
        'drop_path_rate',
        'init_cfg',
    } == (set() if 'mask' in path.stem else {'out_indices'})

    preprocessor = cfg.model.data_preprocessor
    assert preprocessor.mean == [123.675, 116.28, 103.53]
    assert preprocessor.std == [58.395, 57.12, 57.375]
    assert preprocessor.bgr_to_rgb
    assert preprocessor.pad_size_divisor == 32


@pytest.mark.parametrize(
    'path', [p for p in COCO if p not in RTMDET], ids=lambda p: p.stem
)
def test_recipe(path):
    cfg, arch = Config.fromfile(path), arch_of(path)
    lr = 2e-4 if 'mask' in path.stem and arch not in 'ml' else 1e-4
    assert cfg.optim_wrapper == dict(
        _scope_='mmdet',
        type='OptimWrapper',
        optimizer=dict(type='AdamW', lr=lr, weight_decay=1e-4),
    )
    warm_up, steps = cfg.param_scheduler
    assert (warm_up.start_factor, warm_up.end) == (0.001, 500)
    assert (steps.milestones, steps.end) == ([8, 11], 12)
    assert cfg.train_cfg.max_epochs == 12
    assert cfg.train_dataloader.batch_size == 2
    assert cfg.auto_scale_lr.base_batch_size == 16
    pipeline = {t.type: t for t in cfg.train_pipeline}
    assert pipeline['Resize'].scale == (1333, 800)
    assert pipeline['RandomFlip'].prob == 0.5


@pytest.mark.parametrize('path', RTMDET, ids=lambda p: p.stem)
def test_recipe_of_rtmdet(path):
    """It is mmdet's but for the backbone, the widths and the thresholds."""
    cfg = Config.fromfile(path)
    base = Config.fromstring(
        "_base_ = 'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py'", '.py'
    )
    ours = {'model', 'checkpoint', 'auto_scale_lr'}
    assert cfg.keys() - base.keys() == {'custom_imports', 'imagenet'}
    for key in base.keys() - ours:
        assert cfg[key] == base[key], key
    batch = 8 * cfg.train_dataloader.batch_size
    assert cfg.auto_scale_lr.base_batch_size == batch == 256
    assert cfg.checkpoint == cfg.model.backbone.init_cfg.checkpoint

    width = {'t0': 80, 't1': 96, 't2': 96}[arch_of(path)]
    neck, head = cfg.model.neck, cfg.model.bbox_head
    assert neck.out_channels == head.in_channels == width
    assert head.feat_channels == width
    retinanet = Config.fromfile(
        CONFIGS / 'fasternet' / 'retinanet_fasternet-t0_fpn_1x_coco.py'
    ).model.test_cfg
    for key in ('nms_pre', 'score_thr', 'max_per_img'):
        assert cfg.model.test_cfg[key] == retinanet[key]


def test_mini_rtmdet_is_that_of_coco():
    mini, coco = (
        Config.fromfile(CONFIGS / name).model
        for name in (
            'mini/rtmdet_fasternet-t0_nuclei.py',
            'fasternet/rtmdet_fasternet-t0_8xb32-300e_coco.py',
        )
    )
    mini.bbox_head.num_classes = 80
    mini.bbox_head.exp_on_reg = False
    shapes = [
        {k: v.shape for k, v in MODELS.build(model).state_dict().items()}
        for model in (mini, coco)
    ]
    assert shapes[0] == shapes[1]
    assert mini.test_cfg == coco.test_cfg


def test_lr_decay():
    """It is S's, and its constructor lets early blocks learn slowly."""
    cfg = Config.fromfile(LR_DECAY)
    base = Config.fromfile(
        CONFIGS / 'fasternet/mask-rcnn_fasternet-s_fpn_1x_coco.py'
    )
    assert {k for k in cfg if cfg[k] != base.get(k)} == {'optim_wrapper'}
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    rates = {
        id(p): group['lr']
        for group in wrapper.optimizer.param_groups
        for p in group['params']
    }
    for name, blocks in (
        ('backbone.patch_embed.proj', 19),
        ('backbone.stages.4.blocks.12.mlp.0', 3),
        ('backbone.norm6', 0),
        ('neck.fpn_convs.0.conv', 0),
    ):
        rate = rates[id(model.get_submodule(name).weight)]
        assert rate == pytest.approx(2e-4 * 0.9**blocks), name


def test_nothing_is_frozen_and_all_is_optimised():
    cfg = Config.fromfile(
        CONFIGS / 'fasternet' / 'mask-rcnn_fasternet-s_fpn_1x_coco.py'
    )
    model = MODELS.build(cfg.model).train()
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    optimised = {
        id(p) for g in wrapper.optimizer.param_groups for p in g['params']
    }
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad and id(parameter) in optimised, name
    assert all(m.training for m in model.backbone.modules())
