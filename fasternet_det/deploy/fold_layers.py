"""Exact folding of SPConv, SAConv and ConvAWS2d, and of what holds them."""

import copy
from typing import Callable, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
from mmdet.models.backbones import ResNet, detectors_resnet, resnet
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..backbones import SlotResNet
from ..backbones.g_ghost_regnet import Bottleneck, GGhostRegNet, GhostStage
from ..backbones.resnet import BasicBlock
from ..layers import ConvAWS2d, SAConv, SPConv
from ..layers.spconv import halve, mixing_weights

# Owner and name of a convolution, owner and name of the norm after it.
Pair = Tuple[nn.Module, str, nn.Module, str]


def affine(norm: _BatchNorm) -> Tuple[Tensor, Tensor]:
    """Express what a norm does in eval mode.

    Args:
        norm (_BatchNorm): A norm of C channels.

    Returns:
        tuple[Tensor, Tensor]: Scale and shift of shape (C,), in float64.

    Raises:
        ValueError: If it keeps no running statistics.
    """
    if norm.running_var is None:
        raise ValueError(
            f'cannot fold {norm}: without running statistics, what it does '
            'depends on the input'
        )
    scale = 1 / (norm.running_var.double() + norm.eps).sqrt()
    shift = -norm.running_mean.double() * scale
    if norm.affine:
        weight = norm.weight.double()
        return weight * scale, weight * shift + norm.bias.double()
    return scale, shift


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

    The norms are folded into the convolutions of both branches, the map after
    them into their weights in the mix.

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
            conv.gwc, weight * scale3[:, None, None, None], shift3
        )
        scale1, shift1 = affine(conv.bn2)
        self.conv1x1 = _plain(
            conv.conv1x1,
            conv.conv1x1.weight.double() * scale1[:, None, None, None],
            conv.conv1x1.bias.double() * scale1 + shift1,
        )
        for name, value in (('scale', scale), ('shift', shift)):
            value = value[:, None, None].to(conv.gwc.weight.dtype)
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to what the SPConv gives, scaled and shifted."""
        x3, x1 = x.split(self.split_sizes, dim=1)
        if self.stride == (2, 2):
            x1 = halve(x1)
        y, z = self.conv3x3(x3), self.conv1x1(x1)
        weights = mixing_weights(y, z) * self.scale
        out = torch.addcmul(self.shift, weights[0], y)
        return torch.addcmul(out, weights[1], z)


class FoldedSAConv(nn.Module):
    """What an SAConv computes, its two weights standardised once.

    Args:
        conv (SAConv): Is left as it is; not deformable.
    """

    def __init__(self, conv: SAConv) -> None:
        super().__init__()
        self.in_channels = conv.in_channels
        self.stride = conv.stride
        self.use_deform = False
        self.bias = conv.bias
        double = copy.deepcopy(conv).double()
        weight = double.standardised_weight()
        for name, value, rate in (
            ('small', weight, 1),
            ('large', weight + double.weight_diff, 3),
        ):
            plain = nn.Conv2d(
                *(conv.in_channels, conv.out_channels, conv.kernel_size),
                conv.stride,
                tuple(rate * size for size in conv.padding),
                tuple(rate * size for size in conv.dilation),
                conv.groups,
                bias=False,
                device=conv.weight.device,
                dtype=conv.weight.dtype,
            )
            plain.weight.copy_(value)
            self.add_module(name, plain)
        self.switch = conv.switch
        self.pre_context = conv.pre_context
        self.post_context = conv.post_context

    forward = SAConv.forward

    def _both(
        self, x: Tensor, offset_s: None, offset_l: None
    ) -> Tuple[Tensor, Tensor]:
        return self.small(x), self.large(x)


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


def folds_alone(module: nn.Module) -> bool:
    """Whether a layer can be folded without a norm after it."""
    return type(module) in (SPConv, ConvAWS2d) or (
        type(module) is SAConv and not module.use_deform
    )


def fold_alone(
    module: nn.Module,
    name: str = '',
    known: Optional[Dict[nn.Module, nn.Module]] = None,
) -> nn.Module:
    """Fold what needs no norm after it.

    Args:
        module (nn.Module): The children that :func:`folds_alone` are replaced.
        name (str): Its name, for messages.
        known (dict, optional): What has been replaced by what: a layer that
            is shared stays so. Defaults to None, nothing.

    Returns:
        nn.Module: The module, or what replaces it.

    Raises:
        ValueError: If a layer cannot be folded.
    """
    known = {} if known is None else known
    if module not in known:
        known[module] = module
        if type(module) is SAConv and folds_alone(module):
            known[module] = FoldedSAConv(module)
        elif folds_alone(module):
            scale = next(module.parameters()).new_ones(
                module.out_channels, dtype=torch.float64
            )
            known[module] = LAYERS[type(module)](
                module, scale, 0 * scale, name
            )
        else:
            for child_name, child in list(module._modules.items()):
                if child is not None:
                    full_name = f'{name}.{child_name}'.lstrip('.')
                    child = fold_alone(child, full_name, known)
                    setattr(module, child_name, child)
    return known[module]


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
