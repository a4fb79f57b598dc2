"""A user's own project: the README's config, trained and evaluated."""

import json
import re
from pathlib import Path

import pytest
import torch
from mmengine.utils import get_installed_path

from fasternet_det.checkpoint import read_checkpoint

MMDET_TOOLS = Path(get_installed_path('mmdet'), '.mim', 'tools')
README = Path(__file__).parents[1] / 'README.md'


@pytest.fixture(scope='session')
def config(project):
    """Write the README's config into the user's folder."""
    (code,) = re.findall(
        r'```python\n(# my_config.py\n.*?)```', README.read_text(), re.S
    )
    path = project.folder / 'my_config.py'
    path.write_text(code)
    return path


def test_trains_and_evaluates_an_epoch(config, project, imagenet, tmp_path):
    weights = imagenet('s')
    torch.save(weights, tmp_path / 'fasternet_s.pth')
    # Smaller images and one epoch, for CPUs; the checkpoint, as made here.
    said = project(
        *(MMDET_TOOLS / 'train.py', config, '--work-dir', tmp_path / 'run'),
        *('--cfg-options', 'train_cfg.max_epochs=1'),
        f'model.backbone.init_cfg.checkpoint={tmp_path}/fasternet_s.pth',
        'randomness.seed=0',
        'train_dataloader.dataset.pipeline.2.scale=(256,256)',
        'val_dataloader.dataset.pipeline.1.scale=(256,256)',
        'model.test_cfg.score_thr=0',  # after one epoch, all are low
        'param_scheduler.0.end=5',
        'default_hooks.logger.interval=3',
    )
    assert '168 of 183 entries of FasterNet come from' in said
    saved = read_checkpoint(tmp_path / 'run' / 'epoch_1.pth')
    assert saved['meta']['dataset_meta']['classes'] == ('nucleus',)
    trained = saved['state_dict']
    assert trained['bbox_head.retina_cls.weight'].shape[0] == 9  # one class
    key = 'stages.4.blocks.12.mlp.0.weight'
    drift = trained[f'backbone.{key}'] - weights[key]
    assert 0 < drift.abs().mean() < 0.5 * weights[key].abs().mean()

    path = max((tmp_path / 'run').glob('*/vis_data/scalars.json'))
    *steps, evaluated = map(json.loads, path.read_text().splitlines())
    losses = [step['loss'] for step in steps]
    assert losses[-1] < 0.9 * losses[0], losses
    assert 0 <= evaluated['coco/bbox_mAP'] <= 1
