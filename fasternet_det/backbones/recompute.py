"""Less memory in training: recompute what is cheap, to the same bits."""

from contextlib import nullcontext
from functools import partial
from typing import Any, Callable, Dict, List, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules import module as nn_module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

if hasattr(torch.compiler, 'is_compiling'):
    is_compiling = torch.compiler.is_compiling
else:  # before torch 2.3
    is_compiling = torch._dynamo.external_utils.is_compiling

# Without parameters or chance: what comes of a map is always the same.
ACTIVATIONS = (nn.ReLU, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.Hardswish)


def is_traced(x: Any) -> bool:
    """Whether a forward pass is recorded or transformed, not just run.

    Args:
        x (Any): The argument of the forward pass.

    Returns:
        bool: True within ``torch.fx``, ``torch.jit.trace`` and ``torch.func``;
        for ``torch.compile`` and ``torch.export``, ask ``is_compiling()``.
    """
    return not is_compiling() and (
        not isinstance(x, Tensor)
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


class _AsInForward:
    """Run modules in the mode of now, and leave BatchNorm's statistics.

    Recomputing a checkpointed block would otherwise count each batch again.
    Unlike a generator's, this context can be entered once a backward pass.
    """

    def __init__(self, module: nn.Module) -> None:
        self.modes = [(m, m.training) for m in module.modules()]

    def __enter__(self) -> None:
        self.modes_between = [(m, m.training) for m, _ in self.modes]
        self.statistics = [
            (buffer, buffer.clone())
            for m, training in self.modes
            if isinstance(m, _BatchNorm) and training
            for buffer in m.buffers()
        ]
        _set_modes(self.modes)

    def __exit__(self, *exception: Any) -> None:
        _set_modes(self.modes_between)
        with torch.no_grad():
            for buffer, value in self.statistics:
                buffer.copy_(value)


def _set_modes(modes: List[Tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training


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
    if not torch.is_grad_enabled() or is_traced(x):
        return function(x)
    if is_compiling():  # where each change of a statistic is made once
        return checkpoint(function, x, use_reentrant=False)
    return checkpoint(
        function,
        x,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _AsInForward(module)),
    )


class _Saved:
    """A tensor that autograd saves, and which must not change from then on."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # changes with it, in version too
        self.version = tensor._version

    def __call__(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                'one of the variables needed for gradient computation has '
                'been modified by an inplace operation: '
                f'[{self.tensor.type()} {list(self.tensor.shape)}] is at '
                f'version {self.tensor._version}; expected version '
                f'{self.version} instead'
            )
        return self.tensor

    def equals(self, other: '_Saved') -> bool:
        """Whether both are one tensor at one version."""
        a, b = self.tensor, other.tensor
        return (
            self.version == other.version
            and a.untyped_storage()._cdata == b.untyped_storage()._cdata
            and a.shape == b.shape
            and a.stride() == b.stride()
        )


class _NormAct:
    """The values of a BatchNorm and an activation, to be computed again."""

    def __init__(self, norm: nn.Module, act: nn.Module, x: Tensor) -> None:
        self.x = _Saved(x)
        self.act = act
        self.eps = norm.eps
        self.batch_statistics = norm.training or norm.running_mean is None
        statistics = (norm.running_mean, norm.running_var)
        if self.batch_statistics:
            statistics = (None, None)
        # Copies: a step of the optimizer may change the originals.
        self.vectors = [
            None if vector is None else vector.detach().clone()
            for vector in (*statistics, norm.weight, norm.bias)
        ]
        self.users: List[bool] = []  # of the norm's value or the activation's
        self.values: Dict[int, Tensor] = {}

    def add_user(self, of_activation: bool) -> Callable[[], Tensor]:
        """Give a function that computes a value, or finds it computed."""
        self.users.append(of_activation)
        return partial(self._value, len(self.users) - 1)

    def _value(self, user: int) -> Tensor:
        if user not in self.values:
            with torch.no_grad():
                norm = F.batch_norm(
                    self.x(),
                    *self.vectors,
                    training=self.batch_statistics,
                    eps=self.eps,
                )
                act = self.act.forward(norm)
            self.values = {
                i: act if of_activation else norm
                for i, of_activation in enumerate(self.users)
            }
        return self.values.pop(user)


def lean_mlp(mlp: nn.Sequential, x: Tensor) -> Tensor:
    """Apply a convolution, a norm, an activation and a convolution.

    What the norm and the activation give is most of a FasterNet block's
    memory in training, and cheap to compute again from the first
    convolution's output. That is all that changes: modules are called, and
    values, gradients of any order and errors are, as without.

    Args:
        mlp (Sequential): The four modules.
        x (Tensor): Feature map of shape (N, C, H, W).

    Returns:
        Tensor: What ``mlp(x)`` gives.
    """
    if not _can_recompute(mlp, x):
        return mlp(x)
    boxes: List[List[Callable[[], Tensor]]] = []

    def pack(tensor: Tensor) -> List[Callable[[], Tensor]]:
        boxes.append([_Saved(tensor)])
        return boxes[-1]

    conv1, norm, act, conv2 = mlp
    x = conv1(x)
    recipe = _NormAct(norm, act, x)
    with saved_tensors_hooks(pack, lambda box: box[0]()):
        normalised = norm(x)
        activated = act(normalised)
        values = _Saved(activated), _Saved(normalised)  # one if in place
        x = conv2(activated)
    for box in boxes:
        matches = [box[0].equals(value) for value in values]
        if any(matches):
            box[0] = recipe.add_user(of_activation=matches[0])
    return x


def _can_recompute(mlp: nn.Sequential, x: Tensor) -> bool:
    """Whether the norm and the activation are known and unobserved."""
    if is_compiling() or is_traced(x):
        return False
    conv, norm, act, _ = mlp
    return (
        torch.is_grad_enabled()
        and (conv.weight.requires_grad or x.requires_grad)
        # Not SyncBN, which would communicate once more.
        and type(norm) is nn.BatchNorm2d
        and type(act) in ACTIVATIONS
        and type(x) is Tensor
        and not any(map(_has_hook, (mlp, norm, act)))
        and not _others_save_tensors()
    )


def _has_hook(module: nn.Module) -> bool:
    """Whether a module has a hook of its own, or shares one of all modules."""
    return any(
        getattr(module, f'_{kind}_hooks')
        or getattr(nn_module, f'_global_{kind}_hooks')
        for kind in ('forward_pre', 'forward', 'backward_pre', 'backward')
    )


def _others_save_tensors() -> bool:
    """Whether somebody else, such as ``save_on_cpu``, decides what is kept."""
    autograd = torch._C._autograd
    if not autograd._saved_tensors_hooks_is_enabled():
        return True
    if hasattr(autograd, '_top_saved_tensors_default_hooks'):  # torch 2.2
        return autograd._top_saved_tensors_default_hooks(True) is not None
    return False
