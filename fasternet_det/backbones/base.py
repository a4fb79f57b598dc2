"""What the backbones share."""

from functools import partial
from typing import AbstractSet, Any, Dict, List, Sequence, Tuple, Union

import torch
import torch.nn as nn
from mmengine.dist import is_distributed
from mmengine.logging import MMLogger
from mmengine.model import BaseModule
from torch import Tensor
from torch.autograd import Variable
from torch.nn.modules.batchnorm import _BatchNorm

from ..checkpoint import (
    StateDict,
    adapt_stem,
    find_pretrained,
    load_exactly,
    read_state_dict,
)
from .recompute import is_compiling, is_traced


class LayerDepth:
    """What layer-wise learning-rate decay asks of a backbone.

    Its modules are registered in the order in which they run.
    """

    #: The blocks, of which each is a layer.
    layer_types: Tuple[type, ...]

    def get_layer_depth(
        self, param_name: str, prefix: str = ''
    ) -> Tuple[int, int]:
        """Find the layer of a parameter, as mmpretrain's backbones do.

        Args:
            param_name (str): Name of a parameter of the whole model.
            prefix (str): What precedes the backbone's own names, such as
                ``'backbone.'``. Defaults to ``''``.

        Returns:
            tuple[int, int]: The depth, and the number of layers. The stem is
            0; each block is a layer, with what stands between it and the one
            before; what follows the blocks, output norms and heads, is the
            last, the number of layers - 1.

        Raises:
            ValueError: If the backbone has no such parameter.
        """
        names = [prefix + name for name, _ in self.named_parameters()]
        blocks = [
            f'{prefix}{name}.'
            for name, module in self.named_modules()
            if isinstance(module, self.layer_types)
        ]
        if not param_name.startswith(prefix):
            return len(blocks) + 1, len(blocks) + 2
        if param_name not in names:
            raise ValueError(
                f'{type(self).__name__} has no parameter {param_name!r}, '
                f'expected one such as {names[0]!r}'
            )
        before = names[: names.index(param_name) + 1]
        depth = sum(
            any(name.startswith(block) for name in before) for block in blocks
        )
        if depth and not param_name.startswith(blocks[depth - 1]):
            depth += 1
        return depth, len(blocks) + 2


class Backbone(LayerDepth, BaseModule):
    """A stem and stages, of which some are frozen and some give the outputs.

    A subclass has ``_stem()`` and ``_stages()``, which list its modules,
    ``_forward(x)`` and ``find_arch(state_dict)``, and calls ``_freeze()`` when
    all modules are there.

    Args:
        in_channels (int): Channels of the image.
        out_indices (Sequence[int]): A rising selection of ``positions``.
        frozen_stages (int): -1 freezes nothing, 0 the stem, k the stem and
            the stages up to the k-th of ``stage_ends``.
        norm_eval (bool): Whether to keep all BatchNorms in eval mode.
        fork_feat (bool): Whether to give feature maps, not logits.
        init_cfg (dict | list[dict]): Initialisation.

    Raises:
        ValueError: If an argument does not fit.
    """

    #: Where the stages that can give an output are among ``_stages()``.
    positions: Tuple[int, ...]
    #: Where those end that ``frozen_stages`` counts.
    stage_ends: Tuple[int, ...]
    #: Name of the weight that takes in the image.
    stem_weight: str
    #: What ImageNet files hold beside the backbone.
    classifier_keys: AbstractSet[str]
    #: Smallest height and width of the image.
    min_size = 1

    def __init__(
        self,
        in_channels: int,
        out_indices: Sequence[int],
        frozen_stages: int,
        norm_eval: bool,
        fork_feat: bool,
        init_cfg: Union[dict, List[dict]],
    ) -> None:
        super().__init__(init_cfg)
        if (
            not out_indices
            or list(out_indices) != sorted(set(out_indices))
            or not set(out_indices) <= set(self.positions)
        ):
            raise ValueError(
                f'out_indices={out_indices!r} is not a rising selection of '
                f'{self.positions}, the positions of the stages'
            )
        count = len(self.stage_ends)
        if frozen_stages not in range(-1, count + 1):
            raise ValueError(
                f'frozen_stages={frozen_stages!r} is not one of -1 (none), 0 '
                f'(the stem), 1 to {count} (the stem and that many stages)'
            )
        self.in_channels = in_channels
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        self.fork_feat = fork_feat

    def _frozen_modules(self) -> List[nn.Module]:
        """What ``frozen_stages`` names."""
        if self.frozen_stages < 0:
            return []
        ends = (0, *(end + 1 for end in self.stage_ends))
        return [*self._stem(), *self._stages()[: ends[self.frozen_stages]]]

    def _freeze(self) -> None:
        frozen = self._frozen_modules()
        if self.fork_feat:  # what is not run would make DDP wait for gradients
            frozen += self._stages()[self.out_indices[-1] + 1 :]
        for module in frozen:
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> 'Backbone':
        """Set the mode, keeping frozen stages, and all BatchNorms under
        ``norm_eval``, in eval mode.

        Args:
            mode (bool): Whether to train. Defaults to True.

        Returns:
            Backbone: The module itself.
        """
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def init_weights(self) -> None:
        """Initialise as ``init_cfg`` says; a second call changes nothing.

        ``dict(type='Pretrained', checkpoint=...)`` reads every layout that
        :func:`~fasternet_det.checkpoint.read_state_dict` knows and accounts
        for every key. It may have its ``prefix`` and ``ema``; with
        ``stem='adapt'``, RGB weights are fitted to other ``in_channels``.

        Raises:
            ValueError: If a ``Pretrained`` checkpoint cannot be read safely
                or does not fit; the model is then untouched.
            FileNotFoundError: If there is no such checkpoint.
        """
        pretrained = find_pretrained(self.init_cfg)
        if pretrained is None or self.is_init:  # then mmengine's warns
            super().init_weights()
            return
        source = pretrained['checkpoint']
        state_dict = read_state_dict(
            source, pretrained.get('prefix'), pretrained.get('ema', False)
        )
        if pretrained.get('stem') == 'adapt':
            state_dict = adapt_stem(
                state_dict, self.stem_weight, self.in_channels
            )
        self.load_pretrained(state_dict, source)
        self._is_init = True

    def load_pretrained(self, state_dict: StateDict, source: str) -> None:
        """Load a state dict of which every key is accounted for.

        For a backbone, the classifier may be left over; nothing else.

        Args:
            state_dict (dict[str, Tensor]): Tensors by the original's names.
            source (str): Where it is from, for messages.

        Raises:
            ValueError: If it does not fit; the model is then untouched.
        """
        load_exactly(
            self,
            state_dict,
            spare=self.classifier_keys if self.fork_feat else set(),
            source=f'{source} ({self.find_arch(state_dict)})',
        )

    def forward(self, x: Tensor) -> Union[Tuple[Tensor, ...], Tensor]:
        """Compute the feature maps, or the logits of the classifier.

        Args:
            x (Tensor): Image batch of shape (N, in_channels, H, W).

        Returns:
            tuple[Tensor] | Tensor: Maps of shape (N, C, H', W'), with C as
            ``out_channels`` says. Without ``fork_feat``, logits of shape
            (N, num_classes).

        Raises:
            ValueError: If ``x`` has another shape, or is one image that
                leaves BatchNorm a single value of each channel.
        """
        if not is_traced(x) and (
            x.dim() != 4
            or x.shape[1] != self.in_channels
            or min(x.shape[2:]) < self.min_size
        ):
            raise ValueError(
                f'{type(self).__name__} got an input of shape '
                f'{tuple(x.shape)}; expected (N, {self.in_channels}, H, W) '
                f'with H and W at least {self.min_size}'
            )
        first = starts_training(self, x)
        if first:
            frozen = frozen_norms(self)
            if frozen and all(frozen.values()):
                warn_of_frozen_norms(self)
        try:
            outs = self._forward(x)
        except ValueError as error:
            if 'more than 1 value per channel' not in str(error):
                raise
            raise ValueError(
                f'{type(self).__name__} cannot train with an input of shape '
                f'{tuple(x.shape)}, of which a BatchNorm would get a single '
                'value per channel: give it two images or more per process, '
                'larger images unless it pools them, or, with pretrained '
                'weights, norm_eval=True'
            ) from error
        if first and self.fork_feat and is_distributed():
            self._warn_of_unread(outs)
        return outs

    def _warn_of_unread(self, outs: Tuple[Tensor, ...]) -> None:
        """Name, after the first backward pass, outputs that got no gradient.

        DDP, which waits for all parameters' gradients, does not say where
        they are missing.
        """
        unread = {
            i for i, out in zip(self.out_indices, outs) if out.requires_grad
        }
        count = len(unread)

        def on_gradient(i: int, gradient: Tensor) -> None:
            if len(unread) == count:
                # to be run when this backward pass is over, as DDP's own
                Variable._execution_engine.queue_callback(report)
            unread.discard(i)

        def report() -> None:
            trained = {n: p for n, p in self.named_parameters()}
            trained = {n: p for n, p in trained.items() if p.requires_grad}
            waiting = [n for n, p in trained.items() if p.grad is None]
            # autograd.grad, which DDP does not see, leaves all without
            if not unread or not waiting or len(waiting) == len(trained):
                return
            read = [i for i in self.out_indices if i not in unread]
            channels = [
                c
                for i, c in zip(self.out_indices, self.out_channels)
                if i in read
            ]
            MMLogger.get_current_instance().warning(
                f'The loss reads no output {sorted(unread)} of '
                f'{type(self).__name__}, so that {", ".join(waiting[:3])} '
                f'({len(waiting)} parameters in all) get no gradient and '
                'DistributedDataParallel stops at the next step. '
                'Expected to select what the neck reads: '
                f'out_indices={tuple(read)} here and, in the neck, '
                f'in_channels={channels} and start_level=0'
            )

        for i, out in zip(self.out_indices, outs):
            if out.requires_grad:
                out.register_hook(partial(on_gradient, i))


def parse_arch(
    arch: Union[str, dict], settings: Dict[str, tuple], keys: Sequence[str]
) -> Tuple[Any, ...]:
    """Look up an arch, or take it from a dict.

    Args:
        arch (str | dict): A key of ``settings``, or values by ``keys``.
        settings (dict[str, tuple]): Values by name.
        keys (Sequence[str]): What the values are.

    Returns:
        tuple: The values, in the order of ``keys``.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(arch, str) and arch in settings:
        return settings[arch]
    if isinstance(arch, dict) and arch.keys() == set(keys):
        return tuple(arch[key] for key in keys)
    raise ValueError(
        f'arch={arch!r} is neither one of {", ".join(map(repr, settings))} '
        f'nor a dict of just {", ".join(keys)}'
    )


def starts_training(model: nn.Module, x: Tensor) -> bool:
    """Find out, once, that a model is trained from now on.

    Args:
        model (nn.Module): A model.
        x (Tensor): The argument of its forward pass.

    Returns:
        bool: Whether this is its first forward pass with gradients in train
        mode, but for compiled and traced ones.
    """
    first = (
        not is_compiling()
        and not is_traced(x)
        and model.training
        and not hasattr(model, '_has_trained')
        and torch.is_grad_enabled()
        and not x.is_meta
    )
    if first:
        model._has_trained = True
    return first


def frozen_norms(model: nn.Module) -> Dict[str, bool]:
    """Find the BatchNorms that are in eval mode.

    Args:
        model (nn.Module): A model in train mode.

    Returns:
        dict[str, bool]: By name, whether the norm is still as it was made:
        no batch and no weights have given it their statistics.
    """
    return {
        name: not bool(
            norm.running_mean.any()
            or (norm.running_var != 1).any()
            # Some weights have statistics folded into the affine part.
            or (norm.affine and norm.bias.any())
        )
        for name, norm in model.named_modules()
        if isinstance(norm, _BatchNorm)
        and norm.track_running_stats
        and not norm.training
    }


def warn_of_frozen_norms(model: nn.Module) -> None:
    """Warn of norms that are frozen before anything has trained them.

    Args:
        model (nn.Module): Has ``norm_eval`` and ``frozen_stages``.
    """
    options = [f'norm_eval={model.norm_eval}'] * model.norm_eval
    if model.frozen_stages >= 0:
        options.append(f'frozen_stages={model.frozen_stages}')
    MMLogger.get_current_instance().warning(
        f'{type(model).__name__} trains with BatchNorms that '
        f'{" and ".join(options) or "their mode"} keeps at mean 0 and '
        'variance 1, for want of pretrained weights. Expected weights, by '
        "init_cfg=dict(type='Pretrained', checkpoint=...), or, from scratch, "
        'norm_eval=False and frozen_stages=-1'
    )
