"""Configs of mmpretrain build the original's classifier and its recipe."""

import json
from pathlib import Path

import pytest
import torch

from fasternet_det import FasterNet

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / 'configs' / 'imagenet'
STEPS = ROOT / 'tests' / 'data' / 'train_steps.py'
NAMES = [f'fasternet-{arch}_8xb512_in1k' for arch in ('t0', 's')]


@pytest.fixture(scope='module')
def results(openmmlab):
    """What a step of each config gave, by its name."""
    paths = [CONFIGS / f'{name}.py' for name in NAMES]
    said = openmmlab(STEPS, *paths, torchvision=True)
    return dict(zip(NAMES, json.loads(said.splitlines()[-1])))


pytestmark = pytest.mark.torchvision


def test_there_are_all():
    assert {path.stem for path in CONFIGS.glob('*.py')} == set(NAMES)


@pytest.mark.parametrize('name', NAMES)
def test_step(name, results):
    """All of the classifier is the backbone: nothing else has a state."""
    result = results[name]
    arch = name.split('-')[1].split('_')[0]
    with torch.device('meta'):
        backbone = FasterNet(arch, fork_feat=False)
    assert result['keys'] == [f'backbone.{k}' for k in backbone.state_dict()]
    assert result['without_gradient'] == []
    assert result['logits_are_the_backbones'] and result['found']
    assert result['loss'] == pytest.approx(result['expected'], rel=1e-6)
    # mmpretrain's own layer-wise learning-rate decay, by a half
    assert result['rates'].keys() == {
        f'backbone.{k}' for k, _ in backbone.named_parameters()
    }
    for parameter, rate in result['rates'].items():
        depth, layers = backbone.get_layer_depth(parameter, 'backbone.')
        assert rate == 0.5 ** (layers - 1 - depth), parameter
    page = (CONFIGS / 'README.md').read_text()
    millions = sum(p.numel() for p in backbone.parameters()) / 1e6
    assert f'[{arch.upper()}]({name}.py) | {millions:.2f} |' in page


@pytest.mark.parametrize(
    'name, decay, drop_path, mixup, magnitude',
    [(NAMES[0], 0.005, 0, 0.05, []), (NAMES[1], 0.03, 0.1, 0.3, [7])],
)
def test_recipe(name, decay, drop_path, mixup, magnitude, results):
    """The authors', as cfg/fasternet_*.yaml of their code has it."""
    cfg = results[name]['cfg']
    assert cfg['model']['backbone'].get('drop_path_rate', 0) == drop_path
    assert cfg['model']['train_cfg']['augments'] == [
        dict(type='Mixup', alpha=mixup),
        dict(type='CutMix', alpha=1.0),
    ]
    assert cfg['model']['head']['loss'] == dict(
        type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'
    )
    assert cfg['optim_wrapper'] == dict(
        optimizer=dict(type='AdamW', lr=0.004, weight_decay=decay)
    )
    warm_up, cosine = cfg['param_scheduler']
    assert warm_up['start_factor'] * 0.004 == pytest.approx(1e-6)
    assert (warm_up['end'], cosine['begin'], cosine['end']) == (20, 20, 300)
    assert cosine['eta_min'] == 1e-5
    assert cfg['train_cfg']['max_epochs'] == 300
    batch_size = 8 * cfg['train_dataloader']['batch_size']
    assert batch_size == cfg['auto_scale_lr']['base_batch_size'] == 4096

    (hook,) = cfg['custom_hooks']
    (switch,) = hook['schedule']
    assert (hook['type'], switch['action_epoch']) == ('SwitchRecipeHook', 281)
    pipelines = {
        192: cfg['train_dataloader']['dataset']['pipeline'],
        224: switch['train_pipeline'],
    }
    for size, pipeline in pipelines.items():
        transforms = {transform['type']: transform for transform in pipeline}
        assert list(transforms) == [
            *('LoadImageFromFile', 'RandomResizedCrop', 'RandomFlip'),
            *['RandAugment'] * len(magnitude),
            'PackInputs',
        ]
        crop = transforms['RandomResizedCrop']
        assert (crop['scale'], crop['interpolation']) == (size, 'bicubic')
        if magnitude:
            augment = transforms['RandAugment']
            assert augment['policies'] == 'timm_increasing'
            assert augment['num_policies'] == 2
            assert [augment['magnitude_level']] == magnitude
            assert augment['magnitude_std'] == 0.5
    _, resize, crop, _ = cfg['val_dataloader']['dataset']['pipeline']
    assert (resize['scale'], resize['edge']) == (int(224 / 0.9), 'short')
    assert (resize['interpolation'], crop['crop_size']) == ('bicubic', 224)
