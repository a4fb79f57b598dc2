"""Gradient checkpointing that counts every batch once."""

from contextlib import contextmanager, nullcontext
from typing import Callable, Iterator

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


@contextmanager
def _kept_statistics(module: nn.Module) -> Iterator[None]:
    """Leave BatchNorm's running statistics as they are.

    Recomputing a checkpointed block would otherwise count each batch twice.
    """
    kept = [
        (buffer, buffer.clone())
        for norm in module.modules()
        if isinstance(norm, _BatchNorm) and norm.training
        for buffer in norm.buffers()
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)


def recomputed(
    function: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor
) -> Tensor:
    """Apply a function whose activations the backward pass recomputes.

    Args:
        function (Callable): A method of the module, of one tensor.
        module (nn.Module): Holds the BatchNorms that the function uses.
        x (Tensor): The function's argument.

    Returns:
        Tensor: The function's value.
    """
    return checkpoint(
        function,
        x,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _kept_statistics(module)),
    )
