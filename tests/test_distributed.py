"""Two processes on one machine, by gloo."""

import os
import socket

import torch
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from fasternet_det import FasterNet

TINY = dict(embed_dim=8, depths=(1, 1, 2, 1), act_cfg=dict(type='ReLU'))


def train(rank, port, checkpoint, hub):
    os.environ.update(
        MASTER_ADDR='127.0.0.1', MASTER_PORT=port, TORCH_HOME=hub
    )
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', rank=rank, world_size=2)
    model = FasterNet(
        't0',
        out_indices=(0, 2, 4),
        with_cp=True,
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint),
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
    torch.distributed.destroy_process_group()


def test_two_processes(server, golden, filled, tmp_path):
    """One download serves both, and no parameter waits for a gradient."""
    url, requests = server
    want = golden['t0']
    shapes = want['backbone_state_dict'] | want['classifier_only_keys']
    shapes = {k: v for k, v in shapes.items() if not k.startswith('norm')}
    torch.save(filled(shapes), tmp_path / 'www' / 'a.pth')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    mp.spawn(train, (port, f'{url}/a.pth', str(tmp_path / 'home')), nprocs=2)
    assert requests == ['/a.pth']
