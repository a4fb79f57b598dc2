"""Memory of large maps: lent to one tensor at a time, and kept."""

import ctypes
import resource
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from torch import nn

from fasternet_det.deploy import memory
from fasternet_det.deploy.memory import new_empty
from fasternet_det.deploy.operators import FusedConv2d

LIKE = torch.empty(0)


@pytest.fixture(autouse=True)
def nothing_came_back(monkeypatch):
    monkeypatch.setattr(memory, 'blocks', [])


@pytest.fixture
def large(monkeypatch):
    """Lend from 1 KiB on."""
    monkeypatch.setattr(memory, 'LARGE', 2**10)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_comes_back_when_nothing_shares_it(dtype, large):
    like = LIKE.to(dtype)
    first = new_empty(like, 2, 512)
    assert first.shape == (2, 512) and first.dtype == dtype
    assert first.is_contiguous()
    address, view = first.data_ptr(), first[1, -3:].zero_()
    del first
    other = new_empty(like, 1024).fill_(1)
    assert other.data_ptr() != address and view.tolist() == [0, 0, 0]
    assert not memory.blocks
    del view
    again = new_empty(like, 16, 32)  # for less than there is
    assert again.data_ptr() == address and not memory.blocks


def test_of_inference_mode(large):
    """What it leaves serves outside, and the other way round."""
    with torch.inference_mode():
        new_empty(LIKE, 1024).fill_(1)
    x = new_empty(LIKE, 1024).zero_()
    weight = torch.ones(1024, requires_grad=True)
    ((x + 2) * weight).sum().backward()
    assert weight.grad.eq(2).all()
    del x
    with torch.inference_mode():
        assert new_empty(LIKE, 1024).fill_(3).sum() == 3072
    assert len(memory.blocks) == 1


def test_of_another_default_device(large):
    with torch.device('meta'):
        assert new_empty(LIKE, 1024).fill_(3).sum() == 3072


def test_on_another_device(large):
    x = new_empty(LIKE.to('meta'), 2, 512)
    assert x.device.type == 'meta' and x.shape == (2, 512)
    assert not memory.blocks


def test_compiled(large):
    """The compiler, which cannot trace it, allocates by itself."""

    def fill(x):
        return new_empty(x, 1024).fill_(3) + x

    assert torch.compile(fill, backend='eager')(torch.ones(1)).eq(4).all()


def test_grows_to_the_largest(large):
    for count in (256, 1024, 512):
        new_empty(LIKE, count)
        assert len(memory.blocks) == 1
    assert len(memory.blocks[0]) == 4096
    small = new_empty(LIKE, 255)  # less than is lent
    assert len(memory.blocks) == 1 and small.shape == (255,)


def test_threads_never_share_it(large):
    def fill(value):
        for count in range(256, 456):
            x = new_empty(LIKE, count).fill_(value)
            assert (x == value).all()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(fill, range(8)))
    assert 1 <= len(memory.blocks) <= 8  # each holds one while it asks


@torch.no_grad()
def count_faults():
    """By five convolutions to a map of 62 MB."""
    # Pages of 4 KiB each, though the system prefers larger ones.
    PR_SET_THP_DISABLE = 41
    ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    conv = FusedConv2d(nn.Conv2d(256, 256, 3, padding=1))
    x = torch.zeros(1, 200, 304, 256).permute(0, 3, 1, 2)
    faults = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        conv(x)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        faults.append(after - before)
    return faults


@pytest.mark.skipif(sys.platform != 'linux', reason="is of Linux's malloc")
def test_a_large_map_takes_no_fresh_pages():
    """After the first: else there are 15200 for a map of 62 MB, each time.

    In a process of its own: this one may have as much free in one piece.
    """
    with get_context('spawn').Pool(1) as pool:
        faults = pool.apply(count_faults)
    # malloc may have given back what the tiles' buffers left.
    assert faults[0] > 15000 > sum(faults[1:]), faults
