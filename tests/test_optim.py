"""Layer-wise learning-rate decay, parameter by parameter."""

from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper

from fasternet_det import FasterNet, GGhostRegNet, GhostNet, SlotResNet

CONFIGS = Path(__file__).parents[1] / 'configs'
TINY = dict(embed_dim=8, depths=(1, 2, 1, 1), act_cfg=dict(type='ReLU'))
GHOST = dict(depths=(1, 3, 1, 1), widths=(8, 16, 16, 16), group_width=8)


def depths(model, prefix=''):
    """The depth of each group of parameters, by their common prefix."""
    return {
        name: model.get_layer_depth(prefix + name, prefix)
        for name, _ in model.named_parameters()
    }


@pytest.mark.parametrize('prefix', ['', 'backbone.'])
@pytest.mark.parametrize(
    'model, wanted, layers',
    [
        (
            FasterNet(TINY),
            {
                'patch_embed.': 0,
                'stages.0.blocks.0.': 1,
                'stages.1.': 2,
                'stages.2.blocks.0.': 2,
                'stages.2.blocks.1.': 3,
                'stages.3.': 4,
                'stages.4.blocks.0.': 4,
                'stages.5.': 5,
                'stages.6.blocks.0.': 5,
                'norm': 6,
            },
            7,
        ),
        (
            FasterNet(TINY, fork_feat=False),
            {'patch_embed.': 0, 'avgpool_pre_head.': 6, 'head.': 6},
            7,
        ),
        (
            GGhostRegNet(GHOST),
            {
                'conv1.': 0,
                'bn1.': 0,
                'layer1.0.': 1,
                'layer2.base.': 2,
                'layer2.layers.0.': 3,
                'layer2.merge.': 4,
                'layer2.cheap.': 4,
                'layer2.end.': 4,
                'layer3.0.': 5,
                'layer4.0.': 6,
            },
            8,
        ),
        (
            GhostNet(0.25, fork_feat=False),
            {
                'conv_stem.': 0,
                'bn1.': 0,
                'blocks.0.': 1,
                'blocks.6.0.': 7,
                'blocks.6.4.': 11,
                'blocks.8.3.': 16,
                'blocks.9.': 17,
                'conv_head.': 18,
                'classifier.': 18,
            },
            19,
        ),
        (
            SlotResNet(18, base_channels=8),
            {
                'conv1.': 0,
                'bn1.': 0,
                'layer1.0.': 1,
                'layer1.1.': 2,
                'layer4.1.': 8,
            },
            10,
        ),
    ],
    ids=['fasternet', 'classifier', 'g-ghost', 'ghostnet', 'resnet'],
)
def test_depths(model, wanted, layers, prefix):
    found = depths(model, prefix)
    for start, depth in wanted.items():
        mine = {v for k, v in found.items() if k.startswith(start)}
        assert mine == {(depth, layers)}, start
    assert model.get_layer_depth('neck.weight', 'backbone.') == (
        layers - 1,
        layers,
    )
    with pytest.raises(ValueError, match="no parameter '.*none.weight'"):
        model.get_layer_depth(prefix + 'none.weight', prefix)


def detector():
    cfg = Config.fromfile(
        CONFIGS / 'mini/retinanet_fasternet-t0_fpn_nuclei.py'
    )
    cfg.model.backbone.frozen_stages = 0
    return MODELS.build(cfg.model)


def test_groups():
    """Learning rate and weight decay of every parameter of a detector."""
    model = detector()
    wrapper = build_optim_wrapper(
        model,
        dict(
            constructor='LayerDecayOptimWrapperConstructor',
            optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
            paramwise_cfg=dict(
                layer_decay_rate=0.5,
                norm_decay_mult=0,
                custom_keys={'bbox_head': dict(lr_mult=2, decay_mult=0.5)},
            ),
        ),
    )
    groups = {
        id(p): group
        for group in wrapper.optimizer.param_groups
        for p in group['params']
    }
    norms = {
        f'{name}.{kind}'
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.BatchNorm2d)
        for kind in ('weight', 'bias')
    }
    seen = set()
    for name, parameter in model.named_parameters():
        if name.startswith('backbone.patch_embed.'):
            assert id(parameter) not in groups
            continue
        lr, decay = 1e-3, 0.0 if name in norms else 0.05
        if name.startswith('backbone.'):
            depth, layers = model.backbone.get_layer_depth(name, 'backbone.')
            assert layers == 15  # 13 blocks
            lr *= 0.5 ** (layers - 1 - depth)
            seen.add(depth)
        elif 'bbox_head' in name:
            lr, decay = 2e-3, 0.025
        group = groups[id(parameter)]
        assert group['lr'] == pytest.approx(lr), name
        assert group['weight_decay'] == pytest.approx(decay), name
    assert seen == set(range(1, 15))


@pytest.mark.parametrize('rate', [None, 0, 1.5, '0.9', float('nan')])
def test_bad_rates(rate):
    cfg = dict(
        constructor='LayerDecayOptimWrapperConstructor',
        optimizer=dict(type='AdamW', lr=1e-3),
        paramwise_cfg={} if rate is None else dict(layer_decay_rate=rate),
    )
    with pytest.raises(ValueError, match='expected a layer_decay_rate above'):
        build_optim_wrapper(FasterNet(TINY), cfg)


def test_no_learning_rate():
    cfg = dict(
        constructor='LayerDecayOptimWrapperConstructor',
        optimizer=dict(type='AdamW'),
        paramwise_cfg=dict(layer_decay_rate=0.9),
    )
    with pytest.raises(ValueError, match="'AdamW'} has no lr"):
        build_optim_wrapper(FasterNet(TINY), cfg)


def test_backbones_without_depths():
    cfg = dict(
        constructor='LayerDecayOptimWrapperConstructor',
        optimizer=dict(type='AdamW', lr=1e-3),
        paramwise_cfg=dict(layer_decay_rate=0.9),
    )
    with pytest.raises(ValueError, match='Conv2d has no get_layer_depth'):
        build_optim_wrapper(torch.nn.Conv2d(3, 3, 1), cfg)
    build_optim_wrapper(FasterNet(TINY), cfg)  # a bare backbone
