"""Exact folding of BatchNorms into the convolutions beside them."""

import copy
import logging
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
from mmcv.cnn import ConvModule
from mmdet.models.backbones import ResNet, detectors_resnet, resnet
from mmdet.models.dense_heads.tood_head import TaskDecomposition
from mmdet.models.necks import FPN, DilatedEncoder
from mmengine.logging import print_log
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from ..backbones import FasterNet, GGhostRegNet, GhostNet, SlotResNet
from ..backbones.fasternet import FasterNetBlock, PatchEmbed, PatchMerging
from ..backbones.g_ghost_regnet import Bottleneck, GhostStage
from ..backbones.ghostnet import ConvBnAct, GhostBottleneck, GhostModule
from ..backbones.resnet import BasicBlock
from .fold_layers import (
    LAYERS,
    affine,
    fold_alone,
    folds,
    owns_weight,
    with_weight,
)

# Owner and name of a convolution, owner and name of the norm after it.
Pair = Tuple[nn.Module, str, nn.Module, str]


def _of_conv_module(module: ConvModule) -> List[Pair]:
    order = module.order
    if not module.with_norm or order.index('norm') != order.index('conv') + 1:
        return []
    return [(module, 'conv', module, module.norm_name)]


def _of_sequential(sequential: nn.Module) -> List[Pair]:
    """Pair what stands side by side in a Sequential that runs as a whole."""
    names = [name for name, _ in sequential.named_children()]
    return [
        (sequential, conv, sequential, norm)
        for conv, norm in zip(names, names[1:])
    ]


def _of_bottleneck(block: Bottleneck) -> List[Pair]:
    pairs = [(block, f'conv{i}', block, f'bn{i}') for i in (1, 2, 3)]
    return pairs + _of_sequential(block.downsample)


def _of_mmdets_block(block: nn.Module) -> List[Pair]:
    return [
        (block, f'conv{i}', block, getattr(block, f'norm{i}_name'))
        for i in (1, 2, 3)
        if hasattr(block, f'conv{i}')
    ] + _of_sequential(block.downsample or nn.Sequential())


def _of_mmdets_stem(backbone: ResNet) -> List[Pair]:
    if backbone.deep_stem:
        return _of_sequential(backbone.stem)
    return [(backbone, 'conv1', backbone, backbone.norm1_name)]


# Declared, not guessed from the order of siblings, which is not the order in
# which a forward calls them.
PAIRS: Dict[type, Callable[[nn.Module], List[Pair]]] = {
    PatchEmbed: lambda m: [(m, 'proj', m, 'norm')],
    PatchMerging: lambda m: [(m, 'reduction', m, 'norm')],
    FasterNetBlock: lambda m: [(m.mlp, '0', m.mlp, '1')],
    GGhostRegNet: lambda m: [(m, 'conv1', m, 'bn1')],
    Bottleneck: _of_bottleneck,
    GhostStage: lambda m: _of_sequential(m.merge) + _of_sequential(m.cheap),
    GhostNet: lambda m: [(m, 'conv_stem', m, 'bn1')],
    GhostModule: lambda m: (
        _of_sequential(m.primary_conv) + _of_sequential(m.cheap_operation)
    ),
    GhostBottleneck: lambda m: (
        [(m, 'conv_dw', m, 'bn_dw')] + _of_sequential(m.shortcut)
    ),
    ConvBnAct: lambda m: [(m, 'conv', m, 'bn1')],
    ResNet: _of_mmdets_stem,
    resnet.ResNetV1d: _of_mmdets_stem,
    detectors_resnet.DetectoRS_ResNet: _of_mmdets_stem,
    SlotResNet: _of_mmdets_stem,
    resnet.Bottleneck: _of_mmdets_block,
    resnet.BasicBlock: _of_mmdets_block,
    detectors_resnet.Bottleneck: _of_mmdets_block,
    BasicBlock: _of_mmdets_block,
    ConvModule: _of_conv_module,
    DilatedEncoder: lambda m: [
        (m, f'{name}_conv', m, f'{name}_norm') for name in ('lateral', 'fpn')
    ],
}


class _WithoutGraph(TorchFunctionMode):
    """Lets deepcopy copy tensors that a training step left in a module."""

    def __torch_function__(  # noqa: D105
        self,
        func: Callable,
        types: Any,
        args: tuple = (),
        kwargs: Optional[Dict[str, Any]] = None,
    ) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            return args[0].detach().clone()
        return func(*args, **(kwargs or {}))


def _fold_pairs(model: nn.Module) -> None:
    """Replace the convolutions and norms of all declared pairs.

    Replaced, not changed: heads such as RTMDet's share convolutions between
    levels that have own norms.
    """
    # It reads the weight of its convolution, but not a bias.
    apart = {
        module
        for decomposition in model.modules()
        if isinstance(decomposition, TaskDecomposition)
        for module in decomposition.modules()
    }
    for module in list(model.modules()):
        if module in apart or type(module) not in PAIRS:
            continue
        for owner, conv_name, norm_owner, norm_name in PAIRS[type(module)](
            module
        ):
            conv = getattr(owner, conv_name)
            norm = getattr(norm_owner, norm_name)
            if type(conv) in LAYERS and folds(norm):
                folded = LAYERS[type(conv)](conv, *affine(norm))
                if folded is not None:
                    setattr(owner, conv_name, folded)
                    setattr(norm_owner, norm_name, nn.Identity())
                    if isinstance(module, ConvModule):
                        # with which it would fold its norm at each call
                        module.efficient_conv_bn_eval_forward = None


def _fold_layers(model: nn.Module) -> nn.Module:
    """Replace our layers that no norm followed; what is shared stays so."""
    known: Dict[nn.Module, nn.Module] = {}
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child not in known:
                known[child] = fold_alone(child) or child
            module._modules[name] = known[child]
    return fold_alone(model) or model


def _fold_before(norm: _BatchNorm, conv: nn.Conv2d) -> nn.Conv2d:
    """Fold a norm into the 1x1 convolution after it."""
    scale, shift = affine(norm)
    weight = conv.weight.double()  # C_out, C_in, 1, 1
    bias = (weight * shift[:, None, None]).sum((1, 2, 3))
    if conv.bias is not None:
        bias += conv.bias
    return with_weight(conv, weight * scale[:, None, None], bias)


def _fold_output_norms(backbone: FasterNet, neck: FPN) -> None:
    """Fold the backbone's output norms into the FPN's lateral convolutions.

    What the FPN does not read needs no norm. Where an extra level, a padded
    convolution, reads the last output too, its norm stays.
    """
    last = neck.backbone_end_level - 1
    extra_levels = len(neck.fpn_convs) > len(neck.lateral_convs)
    for i, position in enumerate(backbone.out_indices):
        norm = getattr(backbone, f'norm{position}')
        if not folds(norm):
            continue
        if i == last and neck.add_extra_convs == 'on_input' and extra_levels:
            continue
        if neck.start_level <= i <= last:
            lateral = neck.lateral_convs[i - neck.start_level]
            conv = lateral.conv
            if type(conv) is not nn.Conv2d or not owns_weight(conv):
                continue  # one that computes something else from its weight
            lateral.conv = _fold_before(norm, conv)
        setattr(backbone, f'norm{position}', nn.Identity())


def _log_norms(model: nn.Module) -> None:
    """Name the norms that stay: all but a FasterNet's outputs."""
    outputs = {
        getattr(backbone, f'norm{i}', None)
        for backbone in model.modules()
        if isinstance(backbone, FasterNet)
        for i in backbone.out_indices
    }
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module not in outputs
    ]
    if names:
        print_log(
            f'fold: {len(names)} norms stay, as nothing declares what is '
            f'before them, or it cannot take them: {", ".join(names)}',
            logger='current',
            level=logging.INFO,
        )


@torch.no_grad()
def fold(model: nn.Module) -> nn.Module:
    """Fold the BatchNorms of a backbone, or of a detector.

    The copy computes the same function with fewer operators: a norm between
    or after convolutions becomes part of the convolution, a FasterNet's output
    norms part of the FPN's 1x1 lateral convolutions, SPConv's group
    convolution, 1x1 convolution and norm one 3x3 convolution, ConvAWS2d a
    plain convolution and SAConv two. What it does not know, or what cannot be
    folded exactly, stays as it is; a line of mmengine's log names such norms.

    Args:
        model (nn.Module): A module in eval mode. It is left as it is.

    Returns:
        nn.Module: A folded copy, for inference: of the same interface, without
        gradients.

    Raises:
        ValueError: If the model, or a BatchNorm in it, is in train mode.
    """
    if model.training or any(
        isinstance(m, _BatchNorm) and m.training for m in model.modules()
    ):
        raise ValueError('the model is in train mode: call eval() first')
    with _WithoutGraph():
        model = copy.deepcopy(model)
    _fold_pairs(model)
    model = _fold_layers(model)
    backbone = getattr(model, 'backbone', None)
    neck = getattr(model, 'neck', None)
    if isinstance(backbone, FasterNet) and type(neck) is FPN:
        _fold_output_norms(backbone, neck)
    _log_norms(model)
    model.eval()  # mmdet's ResNet does not return itself
    return model.requires_grad_(False)
