"""Trainings that are killed, by SIGKILL, and go on.

Each is a process that mmengine's Runner trains in, on real images; they are
forked from one that has imported everything.
"""

import logging
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from fasternet_det.checkpoint import read_checkpoint
from fasternet_det.datasets import nuclei

MINI = Path(__file__).parents[1] / 'configs' / 'mini'
SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload([__name__])

SMALL = dict(
    train_dataloader=dict(batch_size=2),
    default_hooks=dict(
        checkpoint=dict(type='ExactCheckpointHook', interval=3),
        logger=dict(interval=1),
    ),
    val_dataloader=dict(dataset=dict(indices=1)),
)
EPOCHS = dict(
    train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=2, val_interval=1),
    train_dataloader=dict(
        num_workers=2,
        persistent_workers=True,
        sampler=dict(type='DefaultSampler'),
        dataset=dict(indices=10),
    ),
)
MASK_RCNN = 'mask-rcnn_fasternet-t0_fpn_nuclei.py'
MOSAIC = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='CachedMosaic', img_scale=(64, 64), max_cached_images=5),
    dict(
        type='RandomResize',
        scale=(128, 128),
        ratio_range=(0.5, 2.0),
        keep_ratio=True,
    ),
    dict(type='RandomCrop', crop_size=(64, 64)),
    dict(type='Pad', size=(64, 64), pad_val=dict(img=(114, 114, 114))),
    dict(type='CachedMixUp', img_scale=(64, 64), max_cached_images=4),
    dict(type='PackDetInputs'),
]
TRAININGS = {
    # Random sampling and drop path; gradients that wait for the next ones.
    'iterations': (
        MASK_RCNN,
        dict(
            model=dict(backbone=dict(drop_path_rate=0.2)),
            train_cfg=dict(max_iters=7, val_interval=4),
            optim_wrapper=dict(accumulative_counts=2),
        ),
    ),
    # A sampler that ends, in the third of four passes over it.
    'passes': (
        MASK_RCNN,
        dict(
            train_cfg=dict(max_iters=7, val_interval=10),
            train_dataloader=dict(
                num_workers=2,
                sampler=dict(type='DefaultSampler'),
                dataset=dict(indices=4),
            ),
        ),
    ),
    # Saved in the middle of epochs of five batches.
    'epochs': (
        MASK_RCNN,
        EPOCHS,
        dict(
            train_dataloader=dict(
                batch_sampler=dict(type='AspectRatioBatchSampler')
            ),
            default_hooks=dict(checkpoint=dict(interval=4)),
        ),
    ),
    'rtmdet': (
        'rtmdet_fasternet-t0_nuclei.py',
        EPOCHS,
        dict(
            train_dataloader=dict(dataset=dict(pipeline=MOSAIC)),
            default_hooks=dict(
                checkpoint=dict(interval=1, by_epoch=True, save_best='auto')
            ),
            custom_hooks=[
                dict(
                    type='EMAHook',
                    ema_type='ExpMomentumEMA',
                    update_buffers=True,
                    priority=49,
                ),
                dict(
                    type='PipelineSwitchHook',
                    switch_epoch=2,
                    switch_pipeline=[
                        *MOSAIC[:2],
                        dict(type='Resize', scale=(64, 64)),
                        MOSAIC[-1],
                    ],
                ),
            ],
            train_cfg=dict(max_epochs=3),
        ),
    ),
}


@HOOKS.register_module()
class Kill(Hook):
    """Kill the process after an iteration, before what it would save."""

    def __init__(self, at: int) -> None:
        self.at = at

    def after_train_iter(self, runner: Runner, **_: object) -> None:
        if runner.iter + 1 == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def run(config, resume, kill_at):
    """Train in this process, on one thread."""
    torch.set_num_threads(1)
    log = open(Path(config.work_dir, 'log.txt'), 'a')
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    config.resume = resume
    if kill_at:
        config.custom_hooks = [
            *config.get('custom_hooks', []),
            dict(type='Kill', at=kill_at),
        ]
    Runner.from_cfg(config).train()


def train(config, resume=False, kill_at=None):
    """Train in another process; give its exit code."""
    Path(config.work_dir).mkdir(parents=True, exist_ok=True)
    process = SERVER.Process(target=run, args=(config, resume, kill_at))
    process.start()
    process.join()
    return process.exitcode


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp('nuclei')
    nuclei.convert(str(path))
    return f'{path}/'


@pytest.fixture
def configure(data, tmp_path):
    """Give a config of the mini ones, with images of 64 pixels."""

    def configure(name, *changes):
        *changes, work_dir = changes
        config = Config.fromfile(MINI / name)
        text = config.pretty_text.replace('data/nuclei/', data)
        text = text.replace('256', '64')
        config = Config.fromstring(text, '.py')
        for change in (SMALL, *changes):
            if 'type' in change.get('train_cfg', {}):
                config.train_cfg = {}
            config.merge_from_dict(change)
        config.work_dir = str(tmp_path / work_dir)
        return config

    return configure


def assert_equal(a, b, path=''):
    """Compare checkpoints but for times and names."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            if key not in ('meta', 'message_hub'):
                assert_equal(a[key], b[key], f'{path}.{key}')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b)):
            assert_equal(*pair, f'{path}.{i}')
    else:
        assert a == b, path


def last(config):
    path = Path(config.work_dir, 'last_checkpoint').read_text()
    return read_checkpoint(path)


CASES = [('iterations', 4), ('passes', 6), ('epochs', 7), ('rtmdet', 13)]


@pytest.mark.parametrize('name, kill_at', CASES)
def test_killed_training_ends_the_same(name, kill_at, configure):
    whole, broken = (configure(*TRAININGS[name], k) for k in ('a', 'b'))
    assert train(whole) == 0
    assert train(broken, kill_at=kill_at) == -signal.SIGKILL
    assert train(broken, resume=True) == 0
    assert_equal(last(whole), last(broken))
