"""Memory of large maps, lent anew when it comes back.

From 32 MiB on, glibc's malloc gives a tensor's memory back to the kernel, and
asks it for the next one's, which the kernel fills with zeros: a seventh of the
time of a Mask R-CNN at 800x1216 pixels.
"""

import weakref
from functools import partial
from math import prod
from typing import List

import torch
from torch import Tensor

LARGE = 2**25  # bytes
# Below, malloc does so until a tensor as large has been freed; see mallopt(3),
# M_MMAP_THRESHOLD. Of this one no page is touched.
torch.empty(LARGE - 2**16, dtype=torch.uint8, device='cpu')
# What has come back. There are as many as were lent at once, each as large as
# the largest tensor it was lent to. Threads share them: both append and pop
# are atomic.
blocks: List[Tensor] = []


def new_empty(like: Tensor, *shape: int) -> Tensor:
    """Give an uninitialised tensor, as ``like.new_empty(shape)`` does.

    A large one's memory comes back when no tensor shares it any more.

    Args:
        like (Tensor): Of the dtype, and on the device.
        *shape (int): Any.

    Returns:
        Tensor: Of that shape, contiguous.
    """
    size = prod(shape) * like.itemsize
    lends = size >= LARGE and like.device.type == 'cpu'
    if not lends or torch.compiler.is_compiling():
        return like.new_empty(shape)
    # not on the default device
    allocate = partial(torch.empty, dtype=torch.uint8, device='cpu')
    try:
        block = blocks.pop()
    except IndexError:
        block = allocate(0)
    if len(block) < size:
        block = allocate(size)
    # Tensors that share memory keep alive what it came from.
    lent = block[:size].numpy()
    weakref.finalize(lent, blocks.append, block).atexit = False
    return torch.from_numpy(lent).view(like.dtype).view(shape)
