"""Exact folding of SPConv, SAConv and ConvAWS2d, and of what holds them."""

import copy
from typing import Callable, Dict, List, Tuple

import torch
import torch.nn as nn
from mmdet.models.backbones import ResNet, detectors_resnet, resnet
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..backbones import SlotResNet
from ..backbones.g_ghost_regnet import Bottleneck, GGhostRegNet, GhostStage
from ..backbones.resnet import BasicBlock
from ..layers import ConvAWS2d, SAConv, SPConv
from ..layers.spconv import fuse, halve

# Owner and name of a convolution, owner and name of the norm after it.
Pair = Tuple[nn.Module, str, nn.Module, str]


def affine(norm: _BatchNorm) -> Tuple[Tensor, Tensor]:
    """Express what a norm does in eval mode.

    Args:
        norm (_BatchNorm): A norm of C channels.

    Returns:
        tuple[Tensor, Tensor]: Scale and shift of shape (C,), in float64.
    """
    weight, bias, mean, var = (
        value.double()
        for value in (
            norm.weight,
            norm.bias,
            norm.running_mean,
            norm.running_var,
        )
    )
    scale = weight / (var + norm.eps).sqrt()
    return scale, bias - mean * scale


def _plain(
    like: nn.Conv2d, weight: Tensor, bias: Tensor, groups: int = 1
) -> nn.Conv2d:
    """Make a plain convolution of a weight and bias given in float64."""
    conv = nn.Conv2d(
        *(weight.shape[1] * groups, weight.shape[0], weight.shape[2:]),
        *(like.stride, like.padding, like.dilation, groups),
        device=like.weight.device,
        dtype=like.weight.dtype,
    )
    conv.weight.copy_(weight)
    conv.bias.copy_(bias)
    return conv


class FoldedSPConv(nn.Module):
    """What an SPConv and an affine map after it compute, in eval mode.

    The map y = scale * x + shift is folded into both branches. Their global
    averages, which the softmax compares, are scaled back; the shift, common to
    both, makes no difference there.

    Args:
        conv (SPConv): Is left as it is.
        scale (Tensor): Of shape (out_channels,), in float64.
        shift (Tensor): Of that shape, too.
    """

    def __init__(self, conv: SPConv, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.in_channels = conv.in_channels
        self.split_sizes = conv.split_sizes
        self.stride = conv.stride
        scale3, shift3 = affine(conv.bn1)
        half_out, half_in = conv.out_channels // 2, conv.split_sizes[0] // 2
        gwc, pwc = conv.gwc.weight.double(), conv.pwc.weight.double()
        weight = gwc.new_zeros(conv.out_channels, conv.split_sizes[0], 3, 3)
        weight[:half_out, :half_in] = gwc[:half_out]
        weight[half_out:, half_in:] = gwc[half_out:]
        if conv.stride == (1, 1):
            weight[..., 1:2, 1:2] += pwc
        else:  # after an average of 2x2 pixels
            weight[..., 1:, 1:] += pwc / 4
        self.conv3x3 = _plain(
            conv.gwc,
            weight * (scale3 * scale)[:, None, None, None],
            shift3 * scale + shift,
        )
        scale1, shift1 = affine(conv.bn2)
        self.conv1x1 = _plain(
            conv.conv1x1,
            conv.conv1x1.weight.double()
            * (scale1 * scale)[:, None, None, None],
            (conv.conv1x1.bias.double() * scale1 + shift1) * scale + shift,
        )
        # Where the scale is next to nothing, both branches are the shift, and
        # any mix does.
        back = torch.where(scale.abs() < 1e-13, 0, 1 / scale)[:, None, None]
        self.register_buffer('back', back.to(conv.gwc.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to what the SPConv gives, scaled and shifted."""
        x3, x1 = x.split(self.split_sizes, dim=1)
        if self.stride == (2, 2):
            x1 = halve(x1)
        return fuse(self.conv3x3(x3), self.conv1x1(x1), self.back)


def _fold_spconv(
    conv: SPConv, scale: Tensor, shift: Tensor, name: str
) -> nn.Module:
    for norm in (conv.bn1, conv.bn2):
        if not isinstance(norm, _BatchNorm):
            raise ValueError(
                f'cannot fold {name}: its SPConv has a '
                f'{type(norm).__name__}, expected BatchNorm'
            )
    return FoldedSPConv(conv, scale, shift)


def _fold_aws(
    conv: ConvAWS2d, scale: Tensor, shift: Tensor, name: str
) -> nn.Module:
    double = copy.deepcopy(conv).double()
    bias = 0 if conv.bias is None else double.bias
    return _plain(
        conv,
        double.standardised_weight() * scale[:, None, None, None],
        bias * scale + shift,
        conv.groups,
    )


def _fold_saconv(
    conv: SAConv, scale: Tensor, shift: Tensor, name: str
) -> nn.Module:
    folded = copy.deepcopy(conv).double()
    rows = scale[:, None, None, None]
    for value in (folded.weight_gamma, folded.weight_beta, folded.weight_diff):
        value.mul_(rows)
    # The post-context reads scaled channels, so that it scales them back.
    context = folded.post_context.weight
    scaled = context * rows / scale[:, None, None]
    context.copy_(torch.where((context == 0) | (rows == 0), 0, scaled))
    if not context.to(conv.weight.dtype).isfinite().all():
        raise ValueError(
            f'cannot fold {name}: its norm scales channels by zero, or next '
            'to it, that the post-context of its SAConv reads'
        )
    folded.post_context.bias.mul_(scale).add_(shift)
    if conv.bias is not None:
        folded.bias.mul_(scale)
    return folded.to(conv.weight.dtype)


# How a layer takes the affine map after it; the layer is left as it is.
LAYERS: Dict[type, Callable[[nn.Module, Tensor, Tensor, str], nn.Module]] = {
    SPConv: _fold_spconv,
    SAConv: _fold_saconv,
    ConvAWS2d: _fold_aws,
}


def fold_alone(module: nn.Module, name: str = '') -> nn.Module:
    """Fold what needs no norm after it: SPConv's own, and ConvAWS2d.

    Args:
        module (nn.Module): The children that are such layers are replaced.
        name (str): Its name, for messages.

    Returns:
        nn.Module: The module, or what replaces it.

    Raises:
        ValueError: If a layer cannot be folded.
    """
    if type(module) in (SPConv, ConvAWS2d):
        scale = next(module.parameters()).new_ones(
            module.out_channels, dtype=torch.float64
        )
        return LAYERS[type(module)](module, scale, 0 * scale, name)
    for child_name, child in module.named_children():
        folded = fold_alone(child, f'{name}.{child_name}'.lstrip('.'))
        setattr(module, child_name, folded)
    return module


def _pairs_of_sequential(sequential: nn.Module) -> List[Pair]:
    """Pair what stands side by side in a Sequential that runs as a whole."""
    names = [name for name, _ in sequential.named_children()]
    return [
        (sequential, conv, sequential, norm)
        for conv, norm in zip(names, names[1:])
        if isinstance(getattr(sequential, norm), _BatchNorm)
    ]


def _pairs_of_mmdets_block(block: nn.Module) -> List[Pair]:
    return [
        (block, f'conv{i}', block, getattr(block, f'norm{i}_name'))
        for i in (1, 2, 3)
        if hasattr(block, f'conv{i}')
    ] + _pairs_of_sequential(block.downsample or nn.Sequential())


def _pairs_of_mmdets_stem(backbone: ResNet) -> List[Pair]:
    if backbone.deep_stem:
        return _pairs_of_sequential(backbone.stem)
    return [(backbone, 'conv1', backbone, backbone.norm1_name)]


def _pairs_of_bottleneck(block: Bottleneck) -> List[Pair]:
    return [
        (block, f'conv{i}', block, f'bn{i}') for i in (1, 2, 3)
    ] + _pairs_of_sequential(block.downsample)


# Joins those of fold.py.
LAYER_PAIRS: Dict[type, Callable[[nn.Module], List[Pair]]] = {
    GGhostRegNet: lambda m: [(m, 'conv1', m, 'bn1')],
    Bottleneck: _pairs_of_bottleneck,
    GhostStage: lambda m: (
        _pairs_of_sequential(m.merge) + _pairs_of_sequential(m.cheap)
    ),
    ResNet: _pairs_of_mmdets_stem,
    resnet.ResNetV1d: _pairs_of_mmdets_stem,
    detectors_resnet.DetectoRS_ResNet: _pairs_of_mmdets_stem,
    SlotResNet: _pairs_of_mmdets_stem,
    resnet.Bottleneck: _pairs_of_mmdets_block,
    resnet.BasicBlock: _pairs_of_mmdets_block,
    detectors_resnet.Bottleneck: _pairs_of_mmdets_block,
    BasicBlock: _pairs_of_mmdets_block,
}
