"""Two processes on one machine, by gloo."""

import os
import socket

import torch
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from fasternet_det import FasterNet


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


def test_two_processes(server, imagenet, tmp_path):
    """One download serves both, and no parameter waits for a gradient."""
    url, requests = server
    torch.save(imagenet('t0'), tmp_path / 'www' / 'a.pth')
    (tmp_path / 'www' / 'page.pth').write_text('<html>Log in first</html>')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    mp.spawn(train, (port, url, str(tmp_path / 'home')), nprocs=2)
    assert requests.count('/a.pth') == 1
