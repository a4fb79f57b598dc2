"""Fast forms of GhostNet's blocks and of the T-shaped convolution."""

from typing import Optional

import torch
import torch.nn as nn
from torch import Tensor

from ..backbones.ghostnet import GhostBottleneck, GhostModule
from ..layers import TShapedConv
from .operators import FusedConv2d


class FastTShapedConv(nn.Module):
    """A T-shaped convolution and its activation, without concatenation.

    The partial convolution's output takes the place of the input's first
    channels for as long as the 1x1 convolution reads it.

    Args:
        conv (TShapedConv): The convolution.
        activation (nn.Module, optional): One that the 1x1 convolution fuses.
            Defaults to None.
    """

    def __init__(
        self, conv: TShapedConv, activation: Optional[nn.Module] = None
    ) -> None:
        super().__init__()
        self.stride = conv.stride
        self.channels3 = conv.split_sizes[0]
        self.partial_conv3 = FusedConv2d(conv.partial_conv3)
        self.pointwise_conv = FusedConv2d(conv.pointwise_conv, activation)
        self.activation = self.pointwise_conv.activation

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, H, W), which stays as it is, to (N, C_out, H', W')."""
        first = x[:, : self.channels3].clone()
        mixed = self.partial_conv3(first)
        if self.stride == (2, 2):
            x = x[:, :, ::2, ::2].clone()
        x[:, : self.channels3] = mixed
        out = self.pointwise_conv(x)
        if self.stride == (1, 1):
            x[:, : self.channels3] = first
        return out


class FastGhostModule(nn.Module):
    """A folded GhostModule, the activations fused.

    Args:
        module (GhostModule): The module.
    """

    def __init__(self, module: GhostModule) -> None:
        super().__init__()
        primary, _, activation = module.primary_conv
        self.primary = FusedConv2d(primary, activation)
        self.cheap = FusedConv2d(module.cheap_operation[0], activation)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C', H, W) to (N, C, H, W)."""
        x = self.primary(x)  # (N, C / 2, H, W)
        return torch.cat((x, self.cheap(x)), dim=1)

    def add_to(self, out: Tensor, x: Tensor) -> Tensor:
        """Add what the module, without activation, computes from ``x``.

        Args:
            out (Tensor): Of shape (N, C, H, W).
            x (Tensor): Of shape (N, C', H, W).

        Returns:
            Tensor: The sum, mostly in the memory of ``out``.
        """
        if type(self.cheap) is not FusedConv2d:  # it is of 8 bits
            return out + self(x)
        half = self.primary(x)
        first, second = out.chunk(2, dim=1)
        first.add_(half)
        self.cheap.add_to(second, half)
        return out


class FastGhostBottleneck(nn.Module):
    """A folded GhostBottleneck, whose second module adds its halves to the
    shortcut, without concatenation.

    Args:
        block (GhostBottleneck): The block.
    """

    def __init__(self, block: GhostBottleneck) -> None:
        super().__init__()
        self.ghost1 = FastGhostModule(block.ghost1)
        self.conv_dw = block.conv_dw
        if not isinstance(block.conv_dw, nn.Identity):
            self.conv_dw = FusedConv2d(block.conv_dw)
        self.se = block.se
        for name, conv in block.se.named_children():
            setattr(self.se, name, FusedConv2d(conv))
        self.ghost2 = FastGhostModule(block.ghost2)
        convs = [m for m in block.shortcut if isinstance(m, nn.Conv2d)]
        self.shortcut = nn.Sequential(*map(FusedConv2d, convs))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C', H, W) to (N, C, ceil(H / stride), ceil(W / stride))."""
        # Not in place: the input may be an output of the backbone.
        out = self.shortcut(x) if len(self.shortcut) else x.clone()
        hidden = self.conv_dw(self.ghost1(x))
        return self.ghost2.add_to(out, self.se(hidden))
