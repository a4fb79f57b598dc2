"""Exact folding of BatchNorms into the convolutions beside them."""

import copy
from typing import Callable, Dict, List

import torch
import torch.nn as nn
from mmcv.cnn import ConvModule
from mmdet.models.dense_heads.tood_head import TaskDecomposition
from mmdet.models.necks import FPN
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..backbones import FasterNet, GGhostRegNet, SlotResNet
from ..backbones.fasternet import FasterNetBlock, PatchEmbed, PatchMerging
from .fold_layers import (
    LAYER_PAIRS,
    LAYERS,
    FoldedSAConv,
    FoldedSPConv,
    Pair,
    affine,
    fold_alone,
    folds_alone,
)


def _pairs_of_conv_module(module: ConvModule) -> List[Pair]:
    order = module.order
    if not module.with_norm or order.index('norm') != order.index('conv') + 1:
        return []
    return [(module, 'conv', module, module.norm_name)]


# Declared, not guessed from the order of siblings, which is not the order in
# which a forward calls them.
PAIRS: Dict[type, Callable[[nn.Module], List[Pair]]] = {
    PatchEmbed: lambda m: [(m, 'proj', m, 'norm')],
    PatchMerging: lambda m: [(m, 'reduction', m, 'norm')],
    FasterNetBlock: lambda m: [(m.mlp, '0', m.mlp, '1')],
    ConvModule: _pairs_of_conv_module,
    **LAYER_PAIRS,
}
# One of these a model must hold: others have tools of their own.
OURS = (
    *(FasterNet, GGhostRegNet, SlotResNet),
    *(FoldedSPConv, FoldedSAConv, *LAYERS),
)


def _set(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    dtype = conv.weight.dtype
    conv.weight = nn.Parameter(weight.to(dtype))
    conv.bias = nn.Parameter(bias.to(dtype))


def _bias(conv: nn.Conv2d) -> Tensor:
    if conv.bias is None:
        return conv.weight.new_zeros(conv.out_channels).double()
    return conv.bias.double()


def _fold_after(conv: nn.Conv2d, norm: _BatchNorm) -> None:
    """Fold a norm into the convolution before it."""
    scale, shift = affine(norm)
    weight = conv.weight.double() * scale[:, None, None, None]
    _set(conv, weight, _bias(conv) * scale + shift)


def _fold_before(norm: _BatchNorm, conv: nn.Conv2d) -> None:
    """Fold a norm into the 1x1 convolution after it."""
    scale, shift = affine(norm)
    weight = conv.weight.double()
    bias = _bias(conv) + (weight * shift[:, None, None]).sum((1, 2, 3))
    _set(conv, weight * scale[:, None, None], bias)


def _check_plain(conv: nn.Module, name: str) -> None:
    """Refuse what computes something else from its weight."""
    if type(conv) is not nn.Conv2d:
        raise ValueError(
            f'cannot fold the norm of {name} into a {type(conv).__name__}, '
            'expected nn.Conv2d'
        )


def _unshare(model: nn.Module) -> None:
    """Give each module convolutions of its own.

    Heads such as RTMDet's share them between levels that have own norms.
    """
    seen = set()
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            # Our layers are replaced, not changed.
            if isinstance(child, nn.Conv2d) and type(child) not in LAYERS:
                if child in seen:
                    setattr(module, name, copy.deepcopy(child))
                seen.add(child)


def _fold_pairs(model: nn.Module) -> None:
    """Fold all declared pairs in place."""
    for name, module in list(model.named_modules()):
        pairs = PAIRS.get(type(module), lambda module: [])(module)
        for owner, conv_name, norm_owner, norm_name in pairs:
            conv = getattr(owner, conv_name)
            norm = getattr(norm_owner, norm_name)
            if not isinstance(norm, _BatchNorm):
                continue
            if type(conv) in LAYERS:
                layer = LAYERS[type(conv)](conv, *affine(norm), name)
                setattr(owner, conv_name, layer)
            else:
                _check_plain(conv, name)
                _fold_after(conv, norm)
            setattr(norm_owner, norm_name, nn.Identity())


def _fold_output_norms(backbone: FasterNet, neck: FPN) -> None:
    """Fold the backbone's output norms into the FPN's lateral convolutions.

    What the FPN does not read needs no norm. Where an extra level, a padded
    convolution, reads the last output too, its norm stays.
    """
    last = neck.backbone_end_level - 1
    extra_levels = len(neck.fpn_convs) > len(neck.lateral_convs)
    for i, position in enumerate(backbone.out_indices):
        norm = getattr(backbone, f'norm{position}')
        if not isinstance(norm, _BatchNorm):
            continue
        if i == last and neck.add_extra_convs == 'on_input' and extra_levels:
            continue
        if neck.start_level <= i <= last:
            lateral = neck.lateral_convs[i - neck.start_level]
            _check_plain(lateral.conv, f'output {position}')
            _fold_before(norm, lateral.conv)
        setattr(backbone, f'norm{position}', nn.Identity())


def _norms(model: nn.Module) -> List[str]:
    """Name the norms that are to be folded: all but a FasterNet's outputs."""
    outputs = {
        getattr(backbone, f'norm{i}', None)
        for backbone in model.modules()
        if isinstance(backbone, FasterNet)
        for i in backbone.out_indices
    }
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module not in outputs
    ]


@torch.no_grad()
def fold(model: nn.Module) -> nn.Module:
    """Fold the BatchNorms of one of our backbones, or of what holds one of
    our backbones or layers, such as a detector.

    The copy computes the same function with fewer operators: a norm between
    or after convolutions becomes part of the convolution, a FasterNet's output
    norms part of the FPN's 1x1 lateral convolutions, SPConv's group
    convolution, 1x1 convolution and norm one 3x3 convolution, ConvAWS2d a
    plain convolution and SAConv two.

    Args:
        model (nn.Module): A module in eval mode. It is left as it is.

    Returns:
        nn.Module: A folded copy, for inference: of the same interface, without
        gradients.

    Raises:
        ValueError: If the model trains, is folded already, holds nothing of
            ours, or holds a BatchNorm that no declared pair accounts for.
    """
    if not any(isinstance(m, OURS) for m in model.modules()):
        raise ValueError(
            'expected a backbone or layer of fasternet_det, or what holds '
            f'one; got {type(model).__name__}'
        )
    if model.training or any(
        isinstance(m, _BatchNorm) and m.training for m in model.modules()
    ):
        raise ValueError('the model is in train mode: call eval() first')
    if not _norms(model) and not any(map(folds_alone, model.modules())):
        raise ValueError(
            'the model is folded already, or has nothing to fold: no '
            'BatchNorm, SPConv, SAConv or ConvAWS2d'
        )
    for name, module in model.named_modules():
        if isinstance(module, TaskDecomposition):
            raise ValueError(
                f'cannot fold {name}: a TaskDecomposition reads the weight of '
                'its convolution, but not the bias that folding gives it'
            )
    model = copy.deepcopy(model)
    _unshare(model)
    _fold_pairs(model)
    model = fold_alone(model)
    backbone = getattr(model, 'backbone', None)
    if (
        isinstance(backbone, FasterNet)
        and type(getattr(model, 'neck', None)) is FPN
    ):
        _fold_output_norms(backbone, model.neck)
    left = _norms(model)
    if left:
        raise ValueError(
            f'no declared pair accounts for the norms {", ".join(left)}'
        )
    return model.requires_grad_(False)
