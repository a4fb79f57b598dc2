"""Several processes on one machine, by gloo."""

import copy
import gc
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from mmdet.models.task_modules import RandomSampler
from mmdet.registry import DATASETS, MODELS
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.logging import MMLogger
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from fasternet_det import FasterNet, GGhostRegNet, GhostNet, distributed
from fasternet_det.checkpoint import read_checkpoint
from fasternet_det.datasets import nuclei

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / 'docs' / 'distributed.md').read_text()
COMMANDS = re.findall(r'^(?:torchrun|srun) .*', GUIDE, re.M)


def join(rank, port):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        'gloo',
        f'tcp://127.0.0.1:{port}',
        timedelta(seconds=60),  # for the one that waits for one that failed
        rank=rank,
        world_size=2,
    )


def leave():
    # Gloo's threads need the GIL to drop their tensors, and the last owner of
    # the group holds it while it waits for them: they are to be done first.
    gc.collect()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def pretrained(checkpoint):
    return dict(type='Pretrained', checkpoint=checkpoint)


def train(rank, port, url, hub):
    os.environ.update(TORCH_HOME=hub)
    join(rank, port)
    for name in ('page.pth', 'nowhere.pth'):  # no process waits for another
        try:
            FasterNet(
                't0', init_cfg=pretrained(f'{url}/{name}')
            ).init_weights()
        except (ValueError, FileNotFoundError):
            continue
        raise AssertionError(name)

    model = FasterNet(
        't0',
        out_indices=(0, 2, 4),
        with_cp=True,
        init_cfg=pretrained(f'{url}/a.pth'),
    )
    model.init_weights()
    parallel = DistributedDataParallel(model)
    torch.manual_seed(rank)
    for _ in range(2):  # the second raises where a parameter got no gradient
        outs = parallel(torch.randn(2, 3, 64, 64))
        sum(out.square().mean() for out in outs).backward()
    gradient = model.stages[0].blocks[0].mlp[0].weight.grad
    other = gradient.clone()
    torch.distributed.broadcast(other, 0)
    assert gradient.any() and torch.equal(gradient, other)
    del parallel
    leave()


TINY = dict(embed_dim=8, depths=(1, 1, 2, 1), act_cfg=dict(type='ReLU'))
GHOST = dict(depths=(2, 3, 4, 2), widths=(8, 16, 24, 32), group_width=8)


def expect(model, read, named=None, fails=False, **options):
    """Train two steps, with a loss that reads some of the outputs."""
    log = []
    MMLogger.warning = lambda self, text: log.append(text)
    parallel = DistributedDataParallel(model.train(), **options)
    for step in range(2):
        try:
            outs = parallel(torch.randn(2, 3, 64, 64))
        except RuntimeError as error:
            assert fails and step == 1, error
            assert 'Expected to have finished reduction' in str(error)
            assert log  # so ours came first
            break
        sum(outs[i].square().mean() for i in read).backward()
        # the first step says all
        assert len(log) == (named is not None), (step, log)
    else:
        assert not fails
    for text in named or ():
        assert text in log[0], (text, log[0])


def read_some(rank, port):
    """In each case, both processes do the same."""
    join(rank, port)
    for with_cp in (False, True):
        named = (
            'reads no output [0] of FasterNet, so that norm0.weight, '
            'norm0.bias (2 parameters in all) get no gradient',
            'out_indices=(2, 4, 6) here and, in the neck, '
            'in_channels=[16, 32, 64] and start_level=0',
        )
        model = FasterNet(TINY, with_cp=with_cp)
        expect(model, (1, 2, 3), named, fails=True)
        model = FasterNet(TINY, with_cp=with_cp)
        expect(model, (1, 2, 3), find_unused_parameters=True)
        named = ('[3] of GGhostRegNet', 'layer4.', 'out_indices=(0, 1, 2)')
        model = GGhostRegNet(GHOST, with_cp=with_cp, norm_eval=False)
        expect(model, (0, 1, 2), named, fails=True)
        # No false alarms
        expect(FasterNet(TINY, with_cp=with_cp), (0, 1, 2, 3))
        expect(
            FasterNet(
                TINY, with_cp=with_cp, frozen_stages=0, patch_norm=False
            ),
            (0, 1, 2, 3),
        )
        expect(
            FasterNet(TINY, with_cp=with_cp, out_indices=(2, 4, 6)), (0, 1, 2)
        )
        ghost = dict(arch=GHOST, with_cp=with_cp, norm_eval=False)
        expect(GGhostRegNet(**ghost), (0, 1, 2, 3))
        expect(GGhostRegNet(**ghost), (3,))  # through which the others are
    frozen = FasterNet(TINY)
    frozen.norm0.requires_grad_(False)
    expect(frozen, (1, 2, 3))

    # Of one task's gradients, DDP knows nothing.
    log = []
    MMLogger.warning = lambda self, text: log.append(text)
    model = FasterNet(TINY).train()
    outs = model(torch.randn(2, 3, 64, 64))
    torch.autograd.grad(
        outs[3].sum(), model.parameters(), retain_graph=True, allow_unused=True
    )
    # Forward passes whose gradients nobody asks for say nothing.
    model = FasterNet(TINY).train()
    with torch.no_grad():
        model(torch.randn(2, 3, 64, 64))
    model(torch.randn(2, 3, 64, 64))
    sum(out.sum() for out in model(torch.randn(2, 3, 64, 64))).backward()
    assert not log
    leave()


@pytest.fixture(scope='module')
def pair():
    """Run a function in two processes, which the tests share."""
    with ProcessPoolExecutor(2, mp.get_context('spawn')) as pool:

        def run(function, *args):
            port = free_port()
            for done in [
                pool.submit(function, rank, port, *args) for rank in range(2)
            ]:
                done.result()

        yield run


def test_unread_outputs(pair):
    """They are named at the first step, where DDP stops at the second."""
    pair(read_some)


def test_one_process_needs_no_warning(monkeypatch):
    monkeypatch.setattr(
        MMLogger, 'warning', lambda self, text: pytest.fail(text)
    )
    model = FasterNet(TINY).train()
    model(torch.randn(2, 3, 64, 64))[3].sum().backward()
    assert model.norm0.weight.grad is None


GN = dict(type='GN', num_groups=2)
BN = dict(type='BN')
SYNC_BN = dict(type='SyncBN')
BACKBONES = (
    partial(FasterNet, TINY),
    partial(GGhostRegNet, GHOST, norm_eval=False),
    partial(GhostNet, 0.25),
)


class Read(nn.Module):
    """A backbone whose outputs make a loss, each by a scale."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.scales = nn.Parameter(torch.ones(4))
        for module in self.modules():
            if isinstance(module, (_BatchNorm, nn.GroupNorm)):
                for tensor in module.state_dict().values():
                    if tensor.is_floating_point():
                        tensor.uniform_(0.5, 1.5)

    def forward(self, images):
        means = [out.sin().mean() for out in self.backbone(images)]
        return self.scales @ torch.stack(means)


def expect_equal(rank, make, norm_cfg, device='cpu', **options):
    """Two processes of four images have the gradients of one of eight."""
    torch.manual_seed(0)
    norm_cfgs = (
        norm_cfg,
        dict(norm_cfg, type=norm_cfg['type'].removeprefix('Sync')),
    )
    ours, alone = (
        Read(make(norm_cfg=norm_cfg, **options))
        .to(device, torch.float64)
        .train()
        for norm_cfg in norm_cfgs
    )
    alone.load_state_dict(ours.state_dict())
    before = copy.deepcopy(ours.state_dict())
    images = torch.randn(8, 3, 32, 32, dtype=torch.float64, device=device)
    alone(images).backward()
    parallel = DistributedDataParallel(ours)
    parallel(images[4 * rank :][:4]).backward()

    frozen = 0
    for (name, p), expected in zip(
        ours.named_parameters(), alone.parameters()
    ):
        if p.requires_grad:
            error = (p.grad - expected.grad).abs().max()
            assert 0 <= error <= 1e-10 * expected.grad.abs().max(), name
        else:
            assert p.grad is None
            frozen += 1
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(
            *(buffer, alone.get_buffer(name)), rtol=1e-10, atol=0
        )
        frozen += torch.equal(buffer, before[name])
    return frozen


def equal_backbones(rank, port):
    join(rank, port)
    for make in BACKBONES:
        count = -1
        for k in range(-1, len(make.func.stage_ends) + 1):
            both = (False, True) if make is BACKBONES[0] else (k % 2 == 0,)
            frozen = {
                expect_equal(rank, make, GN, frozen_stages=k, with_cp=with_cp)
                for with_cp in both
            }
            assert min(frozen) > count
            (count,) = frozen
        expect_equal(rank, make, BN, frozen_stages=1, norm_eval=True)
    with pytest.raises(AssertionError, match='scales'):
        expect_equal(rank, BACKBONES[0], BN)
    with pytest.raises(ValueError, match='only work with GPU modules'):
        expect_equal(rank, BACKBONES[0], SYNC_BN)
    leave()


def test_frozen_and_checkpointed_backbones_equal_one_process(pair):
    pair(equal_backbones)


def equal_sync_bn(rank, port):
    join(rank, port)
    for with_cp in (False, True):
        expect_equal(rank, BACKBONES[0], SYNC_BN, 'cuda', with_cp=with_cp)
    leave()


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_backbone_of_sync_bn_equals_one_process(pair):
    """Both processes share the GPU."""
    pair(equal_sync_bn)


def read_detector(name, root):
    """A detector of ``configs/mini``, with GN for BN, and eight tiles."""
    init_default_scope('mmdet')
    cfg = Config.fromfile(ROOT / 'configs' / 'mini' / f'{name}_nuclei.py')
    for part in {'backbone', 'neck', 'bbox_head'} & cfg.model.keys():
        cfg.model[part].norm_cfg = GN
    if name.startswith('mask'):  # each image has more positives than these
        cfg.model.train_cfg.rcnn.sampler.num = 8
        RandomSampler.random_choice = lambda self, found, num: found[:num]
    dataset = cfg.train_dataloader.dataset
    dataset.data_root = root
    dataset.pipeline = [
        transform
        for transform in dataset.pipeline
        if 'Random' not in transform.type
    ]
    tiles = DATASETS.build(dataset)
    torch.manual_seed(0)
    return MODELS.build(cfg.model).train(), [tiles[i] for i in range(8)]


def compute_losses(model, parallel, tiles):
    batch = pseudo_collate(copy.deepcopy(tiles))
    batch = model.data_preprocessor(batch, training=True)
    return model.parse_losses(parallel(**batch, mode='loss'))


def counted(get_targets, counts):
    """Note the positive anchors, by whose number RetinaNet divides."""

    def get_counted_targets(*args, **kwargs):
        *targets, count = get_targets(*args, **kwargs)
        counts.append(count)
        return *targets, count

    return get_counted_targets


def equal_detectors(rank, port, root):
    """To float32's rounding."""
    names = (
        'rtmdet_fasternet-t0',
        'retinanet_fasternet-t0_fpn',
        'mask-rcnn_fasternet-t0_fpn',
    )
    detectors = {name: read_detector(name, root) for name in names}
    expected = {}
    if rank == 0:
        for name, (model, tiles) in detectors.items():
            loss, losses = compute_losses(model, model, tiles)
            loss.backward()
            gradients = [p.grad.clone() for p in model.parameters()]
            expected[name] = losses, gradients
            model.zero_grad()
    join(rank, port)
    for name, (model, tiles) in detectors.items():
        counts = []
        if name.startswith('retinanet'):
            head = model.bbox_head
            head.get_targets = counted(head.get_targets, counts)
        parallel = DistributedDataParallel(model)
        loss, losses = compute_losses(model, parallel, tiles[rank::2])
        weight = 1
        if counts:  # It divides by its own positives, the others by all.
            total = torch.tensor(counts)
            torch.distributed.all_reduce(total)
            weight = 2 * counts[0] / total.item()
            assert abs(weight - 1) > 0.01
        (loss * weight).backward()
        for key, mean in losses.items():
            mean = mean.detach() * weight / 2
            torch.distributed.all_reduce(mean)
            if rank == 0:
                loss = expected[name][0][key].item()
                assert loss and mean.item() == pytest.approx(loss, rel=1e-5)
        if rank == 0:
            for (key, p), gradient in zip(
                model.named_parameters(), expected[name][1]
            ):
                error = (p.grad - gradient).norm()
                assert error <= 1e-5 * gradient.norm(), (name, key)
        del parallel
    leave()


def test_detectors_equal_one_process(pair, tmp_path):
    nuclei.convert(str(tmp_path))
    pair(equal_detectors, f'{tmp_path}/')


EQUAL = """
_base_ = {base!r}
norm_cfg = dict(type='GN', num_groups=4)
model = dict(
    backbone=dict(norm_cfg=norm_cfg),
    neck=dict(norm_cfg=norm_cfg),
    bbox_head=dict(norm_cfg=norm_cfg),
)
_load, _annotate, _, _, _pack = _base_.train_pipeline
train_pipeline = [_load, _annotate, _pack]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
optim_wrapper = dict(optimizer=dict(_delete_=True, type='SGD', lr=0.1))
param_scheduler = []
train_cfg = dict(max_iters=2, val_begin=3)
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=2))
"""
SRUN = """#!/usr/bin/env bash
export SLURM_NTASKS="${1#--ntasks=}" SLURM_NODELIST='node[1-2]'
shift
for ((rank = 0; rank < SLURM_NTASKS; rank++)); do
    SLURM_PROCID=$rank "$@" &
done
for ((rank = 0; rank < SLURM_NTASKS; rank++)); do
    wait -n || { kill $(jobs -p); exit 1; }
done
"""
SCONTROL = """#!/bin/sh
test "$*" = 'show hostname node[1-2]' && echo 127.0.0.1
"""


@pytest.fixture
def sh(project, site, tmp_path):
    """Run a command in a folder with data, on a machine with Slurm."""
    (tmp_path / 'data').symlink_to(project.folder / 'data')
    for name, script in dict(srun=SRUN, scontrol=SCONTROL).items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    path = tmp_path, site / 'bin', Path(sys.executable).parent
    environment = dict(
        os.environ,
        MASTER_PORT=free_port(),
        PATH=':'.join([*map(str, path), os.environ['PATH']]),
        PYTHONPATH=str(site),
    )

    def run(command):
        done = subprocess.run(
            command,
            shell=True,
            text=True,
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert done.returncode == 0, done.stdout[-5000:]

    return run


@pytest.fixture(scope='module')
def alone(project, tmp_path_factory):
    """A config, and its weights after each of two steps in one process."""
    base = project.configs / 'mini' / 'rtmdet_fasternet-t0_nuclei.py'
    folder = tmp_path_factory.mktemp('alone')
    config = folder / 'my_config.py'
    config.write_text(EQUAL.format(base=str(base)))
    work_dir = folder / 'work_dir'
    project('-m', 'fasternet_det', 'train', config, '--work-dir', work_dir)
    return config, *(read_weights(work_dir / f'iter_{i}.pth') for i in (1, 2))


def read_weights(path):
    weights = read_checkpoint(path)['state_dict'].values()
    return torch.cat([weight.flatten() for weight in weights])


def test_with_a_gpu_nothing_changes(monkeypatch):
    monkeypatch.setattr(distributed, 'get_device', lambda: 'cuda')
    before = Runner.setup_env, MMDistributedDataParallel.__init__
    distributed.serve_cpus()
    assert before == (Runner.setup_env, MMDistributedDataParallel.__init__)


@pytest.mark.parametrize('command', COMMANDS)
def test_command(command, sh, alone, trained, config, tmp_path):
    """Training ends with the weights of one process, testing with its AP."""
    work_dir = tmp_path / 'work_dirs' / 'my_config'
    if ' train ' in command:
        mine, first, last = alone
        shutil.copy(mine, tmp_path)
        sh(f'{command} --cfg-options train_dataloader.batch_size=4')
        error = (read_weights(work_dir / 'iter_2.pth') - last).norm()
        assert error < 1e-5 * (last - first).norm()
    else:
        (tmp_path / 'my_config.py').write_text(f'_base_ = {str(config)!r}')
        work_dir.mkdir(parents=True)
        shutil.copy(trained / 'iter_40.pth', work_dir / 'epoch_12.pth')
        sh(command)
        assert read_metrics(work_dir, '*/*.json') == read_metrics(
            trained, '*/vis_data/scalars.json'
        )


def read_metrics(work_dir, files):
    """The APs in the last line of the last file."""
    *_, line = max(work_dir.glob(files)).read_text().splitlines()
    metrics = {k: v for k, v in json.loads(line).items() if 'mAP' in k}
    assert metrics['coco/bbox_mAP'] > 0.15
    return metrics


def free_port():
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return str(free.getsockname()[1])


def test_two_processes(pair, server, imagenet, tmp_path):
    """One download serves both, and no parameter waits for a gradient."""
    url, requests = server
    torch.save(imagenet('t0'), tmp_path / 'www' / 'a.pth')
    (tmp_path / 'www' / 'page.pth').write_text('<html>Log in first</html>')
    pair(train, url, str(tmp_path / 'home'))
    assert requests.count('/a.pth') == 1
