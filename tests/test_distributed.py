"""Two processes on one machine, by gloo."""

import os
import socket

import pytest
import torch
import torch.multiprocessing as mp
from mmengine.logging import MMLogger
from torch.nn.parallel import DistributedDataParallel

from fasternet_det import FasterNet, GGhostRegNet


def pretrained(checkpoint):
    return dict(type='Pretrained', checkpoint=checkpoint)


def train(rank, port, url, hub):
    os.environ.update(
        MASTER_ADDR='127.0.0.1', MASTER_PORT=port, TORCH_HOME=hub
    )
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', rank=rank, world_size=2)
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
    # Gloo's threads need the GIL to drop their tensors, and the last owner of
    # the group holds it while it waits for them: they are to be done first.
    del parallel
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


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
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', rank=rank, world_size=2)
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
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_unread_outputs():
    """They are named at the first step, where DDP stops at the second."""
    mp.spawn(read_some, (free_port(),), nprocs=2)


def test_one_process_needs_no_warning(monkeypatch):
    monkeypatch.setattr(
        MMLogger, 'warning', lambda self, text: pytest.fail(text)
    )
    model = FasterNet(TINY).train()
    model(torch.randn(2, 3, 64, 64))[3].sum().backward()
    assert model.norm0.weight.grad is None


def free_port():
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return str(free.getsockname()[1])


def test_two_processes(server, imagenet, tmp_path):
    """One download serves both, and no parameter waits for a gradient."""
    url, requests = server
    torch.save(imagenet('t0'), tmp_path / 'www' / 'a.pth')
    (tmp_path / 'www' / 'page.pth').write_text('<html>Log in first</html>')
    mp.spawn(train, (free_port(), url, str(tmp_path / 'home')), nprocs=2)
    assert requests.count('/a.pth') == 1
