"""How each kind of convolution takes the affine map after it, exactly."""

import copy
from typing import Callable, Dict, Optional, Tuple

import torch
import torch.nn as nn
from mmcv.cnn.bricks.wrappers import Conv2d
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers import ConvAWS2d, SAConv, SPConv, TShapedConv
from ..layers.spconv import halve, mixing_weights


def folds(norm: nn.Module) -> bool:
    """Whether a module is a norm that is an affine map in eval mode."""
    return isinstance(norm, _BatchNorm) and norm.running_var is not None


def affine(norm: _BatchNorm) -> Tuple[Tensor, Tensor]:
    """Express what a norm does in eval mode.

    Args:
        norm (_BatchNorm): A norm of C channels that :func:`folds`.

    Returns:
        tuple[Tensor, Tensor]: Scale and shift of shape (C,), in float64.
    """
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


def owns_weight(conv: nn.Module) -> bool:
    """Whether a layer's weight is its own, and none that hooks compute."""
    return 'weight' in conv._parameters


def with_weight(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """Copy a convolution that :func:`owns_weight`, with another one.

    Args:
        conv (nn.Conv2d): Is left as it is.
        weight (Tensor): Of the shape of its own.
        bias (Tensor): Of shape (out_channels,).

    Returns:
        nn.Conv2d: The copy, of the dtype of ``conv``.
    """
    folded = copy.deepcopy(conv)
    folded.weight = nn.Parameter(weight.to(conv.weight.dtype))
    folded.bias = nn.Parameter(bias.to(conv.weight.dtype))
    return folded


def _fold_conv(
    conv: nn.Conv2d, scale: Tensor, shift: Tensor
) -> Optional[nn.Module]:
    if not owns_weight(conv):
        return None
    weight = conv.weight.double() * scale[:, None, None, None]
    bias = shift if conv.bias is None else conv.bias.double() * scale + shift
    return with_weight(conv, weight, bias)


def _fold_tshaped(
    conv: TShapedConv, scale: Tensor, shift: Tensor
) -> Optional[nn.Module]:
    pointwise = _fold_conv(conv.pointwise_conv, scale, shift)
    if pointwise is None:
        return None
    folded = copy.deepcopy(conv)
    folded.pointwise_conv = pointwise
    return folded


def _fold_spconv(
    conv: SPConv, scale: Tensor, shift: Tensor
) -> Optional[nn.Module]:
    if not (folds(conv.bn1) and folds(conv.bn2)):
        return None
    return FoldedSPConv(conv, scale, shift)


def _fold_aws(conv: ConvAWS2d, scale: Tensor, shift: Tensor) -> nn.Module:
    double = copy.deepcopy(conv).double()
    bias = 0 if conv.bias is None else double.bias
    return _plain(
        conv,
        double.standardised_weight() * scale[:, None, None, None],
        bias * scale + shift,
        conv.groups,
    )


def _fold_saconv(
    conv: SAConv, scale: Tensor, shift: Tensor
) -> Optional[nn.Module]:
    folded = copy.deepcopy(conv).double()
    rows = scale[:, None, None, None]
    for value in (folded.weight_gamma, folded.weight_beta, folded.weight_diff):
        value.mul_(rows)
    # The post-context reads scaled channels, so that it scales them back.
    context = folded.post_context.weight
    scaled = context * rows / scale[:, None, None]
    context.copy_(torch.where((context == 0) | (rows == 0), 0, scaled))
    if not context.to(conv.weight.dtype).isfinite().all():
        return None  # the norm scales channels by zero, or next to it
    folded.post_context.bias.mul_(scale).add_(shift)
    if conv.bias is not None:
        folded.bias.mul_(scale)
    folded = folded.to(conv.weight.dtype)
    return folded if conv.use_deform else FoldedSAConv(folded)


# What computes a layer and the affine map after it; None if nothing does. The
# layer is left as it is.
LAYERS: Dict[
    type, Callable[[nn.Module, Tensor, Tensor], Optional[nn.Module]]
] = {
    nn.Conv2d: _fold_conv,
    Conv2d: _fold_conv,
    TShapedConv: _fold_tshaped,
    SPConv: _fold_spconv,
    SAConv: _fold_saconv,
    ConvAWS2d: _fold_aws,
}


def fold_alone(layer: nn.Module) -> Optional[nn.Module]:
    """Fold a layer that has no norm after it.

    Args:
        layer (nn.Module): Is left as it is.

    Returns:
        nn.Module: What replaces it, or None: it has nothing to fold.
    """
    if type(layer) is SAConv:
        return None if layer.use_deform else FoldedSAConv(layer)
    if type(layer) not in (SPConv, ConvAWS2d):
        return None
    parameter = next(layer.parameters())
    scale = parameter.new_ones(layer.out_channels, dtype=torch.float64)
    return LAYERS[type(layer)](layer, scale, 0 * scale)
