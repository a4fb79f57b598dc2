"""Fast forms of GhostNet's blocks, of the T-shaped convolution and of FPN."""

from typing import Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmdet.models.necks import FPN
from torch import Tensor

from ..backbones.ghostnet import GhostBottleneck, GhostModule
from ..layers import TShapedConv
from .memory import new_empty
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


class FastFPN(nn.Module):
    """An FPN whose lateral convolutions add to the enlarged maps.

    Feature pyramid networks, arXiv 1612.03144, Sec. 3.

    Args:
        fpn (FPN): One that enlarges to the size of the level below, by the
            nearest pixel.
    """

    def __init__(self, fpn: FPN) -> None:
        super().__init__()
        self.start_level = fpn.start_level
        self.num_outs = fpn.num_outs
        self.add_extra_convs = fpn.add_extra_convs
        self.relu_before_extra_convs = fpn.relu_before_extra_convs
        self.inputs = slice(fpn.start_level, fpn.backbone_end_level)
        self.lateral_convs = fpn.lateral_convs
        self.fpn_convs = fpn.fpn_convs

    def forward(self, inputs: Sequence[Tensor]) -> Tuple[Tensor, ...]:
        """Map backbone maps (N, C_i, H_i, W_i) to (N, C, H_i, W_i), and
        further levels of half the size each.
        """
        inputs = inputs[self.inputs]
        *below, top = zip(self.lateral_convs, inputs)
        laterals = [top[0](top[1])]
        for conv, x in reversed(below):
            laterals.insert(0, self._add(conv, x, laterals[0]))
        outs = [conv(x) for conv, x in zip(self.fpn_convs, laterals)]
        source = dict(
            on_input=inputs[-1], on_lateral=laterals[-1], on_output=outs[-1]
        ).get(self.add_extra_convs)
        for i in range(len(outs), self.num_outs):
            if source is None:
                outs.append(F.max_pool2d(outs[-1], 1, stride=2))
                continue
            source = self.fpn_convs[i](source)
            outs.append(source)
            if self.relu_before_extra_convs:
                source = F.relu(source)
        return tuple(outs)

    def _add(self, conv: nn.Module, x: Tensor, above: Tensor) -> Tensor:
        """Add what a lateral convolution makes of ``x`` to ``above``."""
        if type(conv) is not FusedConv2d or conv.attribute != 'none':
            x = conv(x)
            return x + F.interpolate(above, x.shape[2:])
        n, c = above.shape[:2]
        height, width = x.shape[2:]
        into = new_empty(above, n, height, width, c).permute(0, 3, 1, 2)
        torch.ops.aten.upsample_nearest2d.out(above, [height, width], out=into)
        return conv.add_to(into, x)
