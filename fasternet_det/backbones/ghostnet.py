"""The GhostNet backbone."""

import math
from typing import List, Sequence, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmdet.models.utils import make_divisible
from mmdet.registry import MODELS
from mmengine.model import BaseModule
from torch import Tensor

from ..checkpoint import StateDict
from .base import Backbone
from .recompute import recomputed


def _conv(
    in_channels: int, channels: int, kernel_size: int = 1, stride: int = 1
) -> nn.Conv2d:
    return nn.Conv2d(
        *(in_channels, channels, kernel_size, stride, kernel_size // 2),
        bias=False,
    )


def _depthwise(channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(
        *(channels, channels, kernel_size, stride, kernel_size // 2),
        groups=channels,
        bias=False,
    )


class GhostModule(nn.Module):
    """Half of the channels by a 1x1 convolution, and their ghosts: the other
    half, by a depthwise 3x3 convolution of these. Paper, Sec. 3.1.

    Args:
        in_channels (int): Input channels C'.
        channels (int): Output channels C, an even number.
        relu (bool): Whether a ReLU follows both convolutions.
        norm_cfg (dict): Config of the norms.
    """

    def __init__(
        self, in_channels: int, channels: int, relu: bool, norm_cfg: dict
    ) -> None:
        super().__init__()
        half = channels // 2
        self.primary_conv = nn.Sequential(
            _conv(in_channels, half),
            build_norm_layer(norm_cfg, half)[1],
            nn.ReLU(inplace=True) if relu else nn.Identity(),
        )
        self.cheap_operation = nn.Sequential(
            _depthwise(half, 3),
            build_norm_layer(norm_cfg, half)[1],
            nn.ReLU(inplace=True) if relu else nn.Identity(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C', H, W) to (N, C, H, W)."""
        x = self.primary_conv(x)  # (N, C / 2, H, W)
        return torch.cat((x, self.cheap_operation(x)), dim=1)


class SqueezeExcite(nn.Module):
    """Scale channels by what the whole map says. Paper, Sec. 3.2.

    Args:
        channels (int): Number of channels C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        reduced = make_divisible(channels / 4, 4)
        self.conv_reduce = nn.Conv2d(channels, reduced, 1)
        self.conv_expand = nn.Conv2d(reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, H, W)."""
        scale = F.adaptive_avg_pool2d(x, 1)  # (N, C, 1, 1)
        scale = self.conv_expand(F.relu(self.conv_reduce(scale)))
        return x * F.hardsigmoid(scale)


class GhostBottleneck(BaseModule):
    """Two ghost modules inside a residual. Paper, Fig. 3.

    Args:
        in_channels (int): Input channels C'.
        hidden_channels (int): Channels between the ghost modules.
        channels (int): Output channels C.
        kernel_size (int): Of the depthwise convolutions, those of the ghost
            modules excepted.
        stride (int): 1, or 2 for a depthwise convolution between the modules.
        use_se (bool): Whether a :class:`SqueezeExcite` precedes the second.
        norm_cfg (dict): Config of the norms.
        with_cp (bool): Whether to recompute activations in the backward pass
            instead of storing them.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        channels: int,
        kernel_size: int,
        stride: int,
        use_se: bool,
        norm_cfg: dict,
        with_cp: bool,
    ) -> None:
        super().__init__()
        self.ghost1 = GhostModule(in_channels, hidden_channels, True, norm_cfg)
        self.conv_dw = self.bn_dw = nn.Identity()
        if stride > 1:
            self.conv_dw = _depthwise(hidden_channels, kernel_size, stride)
            self.bn_dw = build_norm_layer(norm_cfg, hidden_channels)[1]
        self.se = SqueezeExcite(hidden_channels) if use_se else nn.Identity()
        self.ghost2 = GhostModule(hidden_channels, channels, False, norm_cfg)
        self.shortcut = nn.Sequential()
        if stride > 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                _depthwise(in_channels, kernel_size, stride),
                build_norm_layer(norm_cfg, in_channels)[1],
                _conv(in_channels, channels),
                build_norm_layer(norm_cfg, channels)[1],
            )
        self.with_cp = with_cp

    def _block(self, x: Tensor) -> Tensor:
        out = self.bn_dw(self.conv_dw(self.ghost1(x)))
        return self.ghost2(self.se(out)) + self.shortcut(x)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C', H, W) to (N, C, ceil(H / stride), ceil(W / stride))."""
        if self.with_cp:
            return recomputed(self._block, self, x)
        return self._block(x)


class ConvBnAct(nn.Module):
    """A 1x1 convolution, a norm and a ReLU.

    Args:
        in_channels (int): Input channels C'.
        channels (int): Output channels C.
        norm_cfg (dict): Config of the norm.
    """

    def __init__(
        self, in_channels: int, channels: int, norm_cfg: dict
    ) -> None:
        super().__init__()
        self.conv = _conv(in_channels, channels)
        self.bn1 = build_norm_layer(norm_cfg, channels)[1]
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C', H, W) to (N, C, H, W)."""
        return self.act(self.bn1(self.conv(x)))


@MODELS.register_module()
class GhostNet(Backbone):
    """GhostNet backbone, C-GhostNet in the authors' later paper.

    A PyTorch implementation of `GhostNet: More Features from Cheap Operations
    <https://arxiv.org/abs/1911.11907>`_ (CVPR 2020), with the parameter names
    and the outputs of the `official code
    <https://github.com/huawei-noah/Efficient-AI-Backbones>`_ and of timm.

    Args:
        width (float): Factor of all channels, which are then rounded to
            multiples of 4. The authors' ImageNet file is of 1.0, the default.
        in_channels (int): Channels of the image. Defaults to 3, as in
            ImageNet files.
        norm_cfg (dict): Config of all norms, such as ``dict(type='SyncBN')``.
            Defaults to ``dict(type='BN')``.
        out_indices (Sequence[int]): Positions in ``blocks`` to output, a
            rising selection of 0 to 9. Blocks 2, 4, 6 and 8 are the last ones
            of strides 4, 8, 16 and 32, of 24, 40, 112 and 160 channels at
            width 1; 9 in place of 8 gives its 960 expanded channels. timm's
            ``features_only`` outputs 1, 3, 5 and 7, the first ones of each
            stride, so that most of the parameters, those behind, never run.
            What lies behind the last output is not run here either, and does
            not require gradients. Defaults to (2, 4, 6, 8).
        frozen_stages (int): -1 freezes nothing, 0 the stem, k the stem and
            the blocks up to 2k: parameters and BatchNorm statistics. Defaults
            to -1.
        norm_eval (bool): Whether to keep all BatchNorms in eval mode while
            training. Defaults to False.
        with_cp (bool): Whether to trade time for memory by recomputing each
            block's activations in the backward pass; values, gradients and
            BatchNorm statistics stay the same. Defaults to False.
        fork_feat (bool): True for a backbone that returns feature maps, False
            for the ImageNet classifier. Defaults to True.
        num_classes (int): Classes of the classifier. Defaults to 1000.
        init_cfg (dict | list[dict], optional): Initialisation, such as what
            :meth:`init_weights` says of ImageNet files. Defaults to None:
            Kaiming's.

    Raises:
        TypeError: If an argument is unknown.
        ValueError: If an argument, the input or a checkpoint does not fit.

    The map of stride s has shape (N, C, ceil(H / s), ceil(W / s)).

    Example:
        >>> import torch
        >>> from fasternet_det import GhostNet
        >>> maps = GhostNet().eval()(torch.rand(1, 3, 224, 224))
        >>> [tuple(m.shape) for m in maps]
        [(1, 24, 56, 56), (1, 40, 28, 28), (1, 112, 14, 14), (1, 160, 7, 7)]
    """

    # Kernel size and stride; of each bottleneck, at width 1, the hidden and
    # the output channels, and whether it has a SqueezeExcite. Paper, Table 1.
    block_settings = (
        (3, 1, [(16, 16, False)]),
        (3, 2, [(48, 24, False)]),
        (3, 1, [(72, 24, False)]),
        (5, 2, [(72, 40, True)]),
        (5, 1, [(120, 40, True)]),
        (3, 2, [(240, 80, False)]),
        (
            3,
            1,
            [
                (200, 80, False),
                (184, 80, False),
                (184, 80, False),
                (480, 112, True),
                (672, 112, True),
            ],
        ),
        (5, 2, [(672, 160, True)]),
        (5, 1, [(960, 160, False), (960, 160, True)] * 2),
    )
    positions = tuple(range(10))
    stage_ends = (2, 4, 6, 8)
    layer_types = (GhostBottleneck, ConvBnAct)
    stem_weight = 'conv_stem.weight'
    classifier_keys = {
        *('conv_head.weight', 'conv_head.bias'),
        *('classifier.weight', 'classifier.bias'),
    }

    def __init__(
        self,
        width: float = 1.0,
        in_channels: int = 3,
        norm_cfg: dict = dict(type='BN'),
        out_indices: Sequence[int] = (2, 4, 6, 8),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        fork_feat: bool = True,
        num_classes: int = 1000,
        init_cfg: Union[dict, List[dict], None] = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_indices,
            frozen_stages,
            norm_eval,
            fork_feat,
            init_cfg or dict(type='Kaiming', layer='Conv2d'),
        )
        if not (isinstance(width, (int, float)) and 0 < width < math.inf):
            raise ValueError(
                f'width={width!r} is no factor of channels, such as 1.0'
            )

        def scaled(channels: int) -> int:
            return make_divisible(channels * width, 4)

        channels = scaled(16)
        self.conv_stem = _conv(in_channels, channels, 3, stride=2)
        self.bn1 = build_norm_layer(norm_cfg, channels)[1]
        self.act1 = nn.ReLU(inplace=True)
        self.blocks = nn.ModuleList()
        out_channels = []
        for kernel_size, stride, bottlenecks in self.block_settings:
            block = nn.Sequential()
            for hidden, out, use_se in bottlenecks:
                block.append(
                    GhostBottleneck(
                        *(channels, scaled(hidden), scaled(out)),
                        *(kernel_size, stride, use_se, norm_cfg, with_cp),
                    )
                )
                channels = scaled(out)
            self.blocks.append(block)
            out_channels.append(channels)
        expanded = scaled(hidden)
        self.blocks.append(
            nn.Sequential(ConvBnAct(channels, expanded, norm_cfg))
        )
        out_channels.append(expanded)

        if fork_feat:
            #: Channels of the outputs, what a neck takes as ``in_channels``.
            self.out_channels = [out_channels[i] for i in self.out_indices]
        else:
            self.conv_head = nn.Conv2d(expanded, 1280, 1)
            self.dropout = nn.Dropout(0.2)
            self.classifier = nn.Linear(1280, num_classes)

        self._freeze()

    def _forward(self, x: Tensor) -> Union[Tuple[Tensor, ...], Tensor]:
        x = self.act1(self.bn1(self.conv_stem(x)))  # stride 2
        outs = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if self.fork_feat and i in self.out_indices:
                outs.append(x)
                if i == self.out_indices[-1]:
                    return tuple(outs)
        x = F.relu(self.conv_head(F.adaptive_avg_pool2d(x, 1)))
        return self.classifier(self.dropout(x.flatten(1)))

    def _stem(self) -> List[nn.Module]:
        return [self.conv_stem, self.bn1]

    def _stages(self) -> List[nn.Module]:
        return list(self.blocks)

    @classmethod
    def find_arch(cls, state_dict: StateDict) -> str:
        """Find out which GhostNet a state dict holds, by its last block.

        Args:
            state_dict (dict[str, Tensor]): Tensors by the original's names.

        Returns:
            str: Its width.
        """
        last = state_dict.get('blocks.9.0.conv.weight')
        return 'no GhostNet' if last is None else f'width {len(last) / 960:g}'
