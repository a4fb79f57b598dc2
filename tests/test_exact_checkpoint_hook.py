"""Trainings that are killed, by SIGKILL, and go on.

Each is a process that mmengine's Runner trains in, on real images; they are
forked from one that has imported everything.
"""

import copy
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.dataset import DefaultSampler
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, DefaultScope
from mmengine.runner import Runner
from mmengine.utils import get_installed_path
from torch.utils.data import BatchSampler, DataLoader, Dataset

from fasternet_det.checkpoint import read_checkpoint
from fasternet_det.datasets import nuclei
from fasternet_det.exact_checkpoint_hook import (
    ExactCheckpointHook,
    _attributes,
    _Fetch,
    _LateRemoval,
    _NumberedBatches,
    _owners,
    _passes,
)

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
EMA = dict(
    type='EMAHook',
    ema_type='ExpMomentumEMA',
    update_buffers=True,
    priority=49,
)
TRAININGS = {
    # Random sampling and drop path; gradients that wait for the next ones.
    'iterations': (
        1,
        MASK_RCNN,
        dict(
            model=dict(backbone=dict(drop_path_rate=0.2)),
            train_cfg=dict(max_iters=7, val_interval=4),
            optim_wrapper=dict(accumulative_counts=2),
        ),
    ),
    # A sampler that ends, in the third of four passes over it.
    'passes': (
        1,
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
    # Saved in the middle of an epoch, of five batches, and after what is best.
    'epochs': (
        1,
        MASK_RCNN,
        EPOCHS,
        dict(
            train_dataloader=dict(
                batch_sampler=dict(type='AspectRatioBatchSampler')
            ),
            default_hooks=dict(
                checkpoint=dict(
                    interval=4, max_keep_ckpts=-1, save_best='auto'
                )
            ),
        ),
    ),
    'rtmdet': (
        1,
        'rtmdet_fasternet-t0_nuclei.py',
        EPOCHS,
        dict(
            model=dict(
                data_preprocessor=dict(
                    batch_augments=[
                        dict(
                            type='BatchSyncRandomResize',
                            random_size_range=(96, 128),  # of images of 64
                            interval=2,
                        )
                    ]
                )
            ),
            train_dataloader=dict(dataset=dict(pipeline=MOSAIC)),
            default_hooks=dict(
                checkpoint=dict(interval=1, by_epoch=True, save_best='auto')
            ),
            custom_hooks=[
                EMA,
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
    # Each with statistics of its own, which they average at the end.
    'processes': (
        2,
        MASK_RCNN,
        dict(
            train_cfg=dict(max_iters=5, val_interval=10),
            custom_hooks=[dict(type='SyncBuffersHook')],
        ),
    ),
    # Epochs of three batches, by two workers of each process, whose caches
    # could outlive them; saved after four each.
    'mosaics': (
        2,
        'rtmdet_fasternet-t0_nuclei.py',
        EPOCHS,
        dict(
            model=dict(use_syncbn=False),  # which needs GPUs
            train_dataloader=dict(dataset=dict(pipeline=MOSAIC)),
            default_hooks=dict(checkpoint=dict(interval=4)),
            custom_hooks=[EMA],
            train_cfg=dict(max_epochs=3),
        ),
    ),
}


@HOOKS.register_module()
class Stop(Hook):
    """Kill the process, or fill its disk, at an iteration."""

    def __init__(self, kill_at=None, kill_in_val_at=None, full_at=None):
        self.kill_at = kill_at
        self.kill_in_val_at = kill_in_val_at
        self.full_at = full_at

    def after_train_iter(self, runner, **_):
        if runner.iter + 1 == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.full_at and runner.iter in (0, 3):  # before, and between
            runner.save_checkpoint(runner.work_dir, f'mine{runner.iter}.pth')
        if runner.iter + 1 == self.full_at:  # as good as a full disk
            limit = 5 << 20
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    def before_val(self, runner):
        if runner.iter == self.kill_in_val_at:
            os.kill(os.getpid(), signal.SIGKILL)


def run(config, rank, processes, port):
    """Train in this process, on one thread."""
    torch.set_num_threads(1)
    if processes > 1:
        os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
        os.environ.update(WORLD_SIZE=str(processes), RANK=str(rank))
        os.environ.update(LOCAL_RANK=str(rank))
        config.launcher = 'pytorch'
    log = open(Path(config.work_dir, f'log{rank}.txt'), 'a')
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    Runner.from_cfg(config).train()


def start(config, resume=False, processes=1, **stop):
    """Start a training in processes of its own."""
    config = copy.deepcopy(config)
    config.resume = resume
    config.custom_hooks = [
        *config.get('custom_hooks', []),
        dict(type='Stop', **stop),
    ]
    Path(config.work_dir).mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    started = [
        SERVER.Process(target=run, args=(config, rank, processes, port))
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    return started


def train(config, **options):
    """Train in other processes; give the exit code that they share."""
    started = start(config, **options)
    for process in started:
        process.join()
    (code,) = {process.exitcode for process in started}
    return code


def log(config):
    path = Path(config.work_dir, 'log0.txt')
    return path.read_text() if path.exists() else ''


@pytest.fixture(scope='module', autouse=True)
def preloaded():
    """Start what all are forked from, to which Python 3.11 gives no path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', os.pathsep.join(sys.path))
        forkserver.ensure_running()


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp('nuclei')
    nuclei.convert(str(path))
    return f'{path}/'


@pytest.fixture(scope='module')
def configure(data, tmp_path_factory):
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
        config.work_dir = str(tmp_path_factory.getbasetemp() / work_dir)
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


CASES = [
    ('iterations', dict(kill_at=4)),
    ('epochs', dict(kill_at=5)),
    ('rtmdet', dict(kill_at=8)),
    ('processes', dict(kill_at=4)),
    pytest.param('passes', dict(kill_at=6), marks=pytest.mark.kills),
    pytest.param('mosaics', dict(kill_at=5), marks=pytest.mark.kills),
    pytest.param('rtmdet', dict(kill_in_val_at=5), marks=pytest.mark.kills),
]
KILLED = -signal.SIGKILL


@pytest.fixture(scope='module')
def whole(configure):
    """Give a training that ran through, once for all that are compared."""
    done = {}

    def whole(name):
        if name not in done:
            processes, *changes = TRAININGS[name]
            config = configure(*changes, f'{name}-whole')
            assert train(config, processes=processes) == 0, log(config)
            done[name] = config
        return done[name]

    return whole


def assert_ends_the_same(name, stop, whole, configure):
    processes, *changes = TRAININGS[name]
    config = configure(*changes, f'{name}-{stop}')
    assert train(config, processes=processes, **stop) == KILLED, log(config)
    code = train(config, processes=processes, resume=True)
    assert code == 0, log(config)
    assert_equal(last(whole(name)), last(config))
    names = [
        sorted(path.name for path in Path(work_dir).glob('*.pth'))
        for work_dir in (whole(name).work_dir, config.work_dir)
    ]
    assert names[0] == names[1]
    shutil.rmtree(config.work_dir)


@pytest.mark.parametrize('name, stop', CASES)
def test_killed_training_ends_the_same(name, stop, whole, configure):
    assert_ends_the_same(name, stop, whole, configure)


@pytest.mark.kills
@pytest.mark.parametrize('seed', range(20))
@pytest.mark.parametrize('name', TRAININGS)
def test_killed_anywhere(name, seed, whole, configure):
    config = whole(name)
    at = random.Random(f'{name} {seed}').randint(
        1, last(config)['meta']['iter']
    )
    assert_ends_the_same(name, dict(kill_at=at), whole, configure)


def kill_while_saving(configure, times):
    """Kill a training while it saves, and resume it, again and again."""
    changes = dict(
        train_cfg=dict(max_iters=2 * times + 1, val_interval=1000),
        default_hooks=dict(checkpoint=dict(interval=1)),
    )
    config = configure(MASK_RCNN, changes, 'saving')
    for i in range(times):
        (process,) = start(config, resume=i > 0)
        steps = []
        while len(steps) < 2 * i + 2:  # the second one of each start
            assert process.is_alive(), log(config)
            time.sleep(0.001)
            steps = re.findall(r'Saving checkpoint at (\d+)', log(config))
        # At any moment of saving or, each second time, of writing the file.
        new = Path(config.work_dir, f'iter_{steps[-1]}.pth')
        part = Path(f'{new}.part')
        while i % 2 and not (part.exists() or new.exists()):
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.02 if i % 2 else 0.5))
        process.kill()
        process.join()
        steps = re.findall(r'Saving checkpoint at (\d+)', log(config))
        assert last(config)['meta']['iter'] >= int(steps[-1]) - 1
        yield sorted(path.name for path in Path(config.work_dir).glob('*.p*'))
    assert train(config, resume=True) == 0
    whole = configure(MASK_RCNN, changes, 'unkilled')
    assert train(whole) == 0
    assert_equal(last(whole), last(config))


def test_killed_while_saving(configure):
    list(kill_while_saving(configure, 2))


@pytest.mark.kills
def test_killed_while_saving_often(configure):
    left = list(kill_while_saving(configure, 20))
    # Some came before the new one was there, and some before the old one went.
    assert any('part' in name for names in left for name in names), left


def test_full_disk(configure):
    """One clear error, and what was saved before is as it was."""
    config = configure(MASK_RCNN, dict(train_cfg=dict(max_iters=7)), 'full')
    assert train(config, full_at=5) == 1
    error = log(config).strip().splitlines()[-1]
    assert re.match(
        r'OSError: \[Errno 27\] File too large: .*iter_6.pth needs [\d,]+ '
        r'bytes, and .* has [\d,]+ free\. It was not written, .* intact',
        error,
    )
    assert last(config)['meta']['iter'] == 3
    left = {path.name for path in Path(config.work_dir).glob('iter*')}
    assert left == {'iter_3.pth'}
    for name in ('mine0.pth', 'mine3.pth'):  # by another, of no state
        saved = read_checkpoint(Path(config.work_dir, name))
        assert saved['state_dict'] and 'exact_resume' not in saved


def test_file_client_args_are_refused():
    hook = ExactCheckpointHook(file_client_args=dict(backend='disk'))
    with pytest.raises(ValueError, match='takes backend_args, not the file_c'):
        hook.before_train(None)


def test_names_without_a_step_are_refused():
    """The older checkpoint would go last, and it would be the new one."""
    hook = ExactCheckpointHook(filename_tmpl='latest.pth', max_keep_ckpts=1)
    with pytest.raises(ValueError, match="tmpl='latest.pth' calls all checkp"):
        hook.before_train(None)


@pytest.mark.parametrize(
    'processes, unused, warns',
    [(2, False, False), (3, False, True), (3, True, False), (3, None, False)],
)
def test_warns_of_many_processes(processes, unused, warns, monkeypatch):
    """Of three summands, the order can be seen."""
    hook_module = sys.modules[ExactCheckpointHook.__module__]
    monkeypatch.setattr(hook_module, 'get_world_size', lambda: processes)
    model = SimpleNamespace()
    if unused is not None:  # a wrapper
        model.find_unused_parameters = unused
    said = []
    ExactCheckpointHook()._warn(
        SimpleNamespace(
            model=model,
            logger=SimpleNamespace(warning=said.append),
            **dict(_resume=True, _has_loaded=True),
        )
    )
    assert ['unused_parameters' in line for line in said] == [True] * warns


@pytest.mark.parametrize('what', ['loader', 'sampler'])
def test_built_samplers_are_refused(what):
    """A built one would go on in an order of its own."""
    sampler = DefaultSampler(range(4))
    loader = DataLoader(range(4), sampler=sampler)
    if what == 'sampler':
        loader = dict(sampler=sampler)
    runner = SimpleNamespace(train_loop=None, _train_dataloader=loader)
    with pytest.raises(TypeError, match='builds the sampler .* as configs'):
        ExactCheckpointHook()._number_batches(runner)


def test_the_older_best_goes_last(tmp_path):
    """After the new one, as mmengine would remove it before."""
    backend, path = _LateRemoval(), tmp_path / 'best.pth'
    backend.put(b'weights', str(path))
    backend.remove(str(path))
    assert path.read_bytes() == b'weights'
    backend.remove_outdated()
    assert list(tmp_path.iterdir()) == []


def resume_changed(config, work_dir, checkpoint):
    """Train one iteration more than there was, from another checkpoint."""
    config = copy.deepcopy(config)
    config.work_dir = f'{config.work_dir}-{work_dir}'
    Path(config.work_dir).mkdir()
    path = Path(config.work_dir, 'a.pth')
    torch.save(checkpoint, path)
    Path(config.work_dir, 'last_checkpoint').write_text(str(path))
    if 'max_iters' in config.train_cfg:
        config.train_cfg.max_iters += 1
    return train(config, resume=True), log(config)


@pytest.mark.parametrize(
    'name, old, new',
    [
        ('iterations', {}, dict(batch_size=3)),
        ('iterations', dict(processes=2), dict(processes=1)),
        ('rtmdet', {}, dict(num_workers=1)),
    ],
)
def test_other_batches_are_refused(name, old, new, whole):
    config = copy.deepcopy(whole(name))
    checkpoint = last(config)
    layout = checkpoint['exact_resume']['layout']
    expected = layout | new
    layout.update(old)
    config.train_dataloader.update(
        {key: value for key, value in new.items() if key != 'processes'}
    )
    code, said = resume_changed(config, *new, checkpoint)
    assert code == 1
    error = said.strip().splitlines()[-1]
    assert error.startswith(
        f'ValueError: the checkpoint was saved with {layout}, and the '
        f'training goes on with {expected}: give it the same'
    )


def test_checkpoints_of_another_hook(whole):
    config = whole('iterations')
    checkpoint = last(config)
    del checkpoint['exact_resume']
    code, said = resume_changed(config, 'another', checkpoint)
    assert code == 0
    assert 'This checkpoint is not of ExactCheckpointHook' in said
    assert 'no checkpoint to resume from' not in said


def test_resumed_from_nothing(configure):
    config = configure(MASK_RCNN, dict(train_cfg=dict(max_iters=1)), 'nothing')
    assert train(config, resume=True) == 0
    assert 'There is no checkpoint to resume from' in log(config)


class Items(Dataset):
    """Draws from every source, and counts what it has drawn."""

    def __init__(self):
        self.pipeline = [SimpleNamespace(results_cache=[])]

    def __len__(self):
        return 5

    def __getitem__(self, index):
        cache = self.pipeline[0].results_cache
        cache.append(index)
        drawn = random.random(), np.random.rand(), torch.rand(1).item()
        return index, len(cache), *drawn


def draw(done, num_workers, persistent=False, count=7):
    """Load batches, two in each pass, and caches dropped after three."""
    items = Items()
    items.__getitems__ = _Fetch(items, 7)
    batches = BatchSampler(DefaultSampler(items, seed=1), 2, drop_last=True)
    numbered = _NumberedBatches(batches, lambda number: number % 3 == 0)
    numbered.number = numbered.skip = done
    assert len(numbered) == 2
    passes = _passes(
        DataLoader(
            items,
            batch_sampler=numbered,
            num_workers=num_workers,
            persistent_workers=persistent,
            collate_fn=list,
        ),
        done,
    )
    return [next(passes) for _ in range(count)]


@pytest.mark.parametrize(
    'num_workers, persistent',
    [(0, False), (1, False), (1, True), (2, False), (2, True)],
)
def test_batches_are_numbered(num_workers, persistent):
    whole = draw(0, num_workers, persistent)
    if num_workers < 2:  # with caches for three batches, and a pass at most
        counts = [item[1] for batch in whole for item in batch]
        assert counts == [1, 2, 3, 4] + [1, 2] * 2 + [1, 2, 3, 4] + [1, 2]
    for i in range(2, 5):  # of floats drawn, none is drawn again
        assert len({item[i] for batch in whole for item in batch}) == 14
    orders = [[item[0] for item in batch] for batch in whole]
    assert orders[:2] != orders[2:4]  # for each pass has its epoch
    # Of two workers, the first one has what was the second one's.
    assert draw(3, num_workers, persistent) == [None] * 3 + whole[3:]


def test_a_loader_without_batches():
    batches = BatchSampler(DefaultSampler(range(1)), 2, drop_last=True)
    loader = DataLoader(
        range(1), batch_sampler=_NumberedBatches(batches, lambda number: False)
    )
    with pytest.raises(ValueError, match='gives no batch: has it images'):
        next(_passes(loader, 0))


def test_what_a_model_keeps_outside_its_tensors():
    """Dynamic R-CNN adapts a threshold of its assigner's, and its loss."""
    path = 'dynamic_rcnn/dynamic-rcnn_r50_fpn_1x_coco.py'
    mmdet = Path(get_installed_path('mmdet'), '.mim', 'configs')
    config = Config.fromfile(mmdet / path).model
    head = dict(config.roi_head, train_cfg=config.train_cfg.rcnn)
    head['test_cfg'] = config.test_cfg.rcnn
    with DefaultScope.overwrite_default_scope('mmdet'):
        a, b = MODELS.build(head), MODELS.build(head)
    a.iou_history = [np.float64(0.7)] * 5
    a.beta_history = [0.3] * 5
    a.update_hyperparameters()
    found, owners = _attributes(a), _owners(b)
    changed = {
        key: value
        for key, value in found.items()
        if _attributes(b)[key] != value
    }
    assert changed[('.bbox_assigner', 'pos_iou_thr')] == 0.7
    assert changed[('bbox_head.loss_bbox', 'beta')] == 0.3
    for (name, key), value in changed.items():
        setattr(owners[name], key, value)
    assert _attributes(b) == found
