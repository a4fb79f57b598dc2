"""The G-Ghost RegNet backbone."""

from typing import List, Sequence, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmdet.registry import MODELS
from mmengine.model import BaseModule, Sequential
from torch import Tensor

from ..checkpoint import StateDict
from .base import Backbone, parse_arch
from .recompute import recomputed


def _conv1x1(in_channels: int, channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, 1, stride, bias=False)


class Bottleneck(BaseModule):
    """RegNetX's residual block: 1x1, grouped 3x3 and 1x1 of one width.

    Args:
        in_channels (int): Input channels C'.
        channels (int): Output channels C.
        group_width (int): Channels per group of the 3x3 convolution.
        norm_cfg (dict): Config of the norms.
        stride (int): Stride of the 3x3 convolution. Defaults to 1.
        with_cp (bool): Whether to recompute activations in the backward pass
            instead of storing them. Defaults to False.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        group_width: int,
        norm_cfg: dict,
        stride: int = 1,
        with_cp: bool = False,
    ) -> None:
        super().__init__()
        self.conv1 = _conv1x1(in_channels, channels)
        self.bn1 = build_norm_layer(norm_cfg, channels)[1]
        self.conv2 = nn.Conv2d(
            channels,
            channels,
            3,
            stride,
            padding=1,
            groups=channels // min(channels, group_width),
            bias=False,
        )
        self.bn2 = build_norm_layer(norm_cfg, channels)[1]
        self.conv3 = _conv1x1(channels, channels)
        self.bn3 = build_norm_layer(norm_cfg, channels)[1]
        self.relu = nn.ReLU(inplace=True)
        self.downsample = (
            nn.Sequential(
                _conv1x1(in_channels, channels, stride),
                build_norm_layer(norm_cfg, channels)[1],
            )
            if stride > 1 or in_channels != channels
            else nn.Identity()
        )
        self.with_cp = with_cp

    def _block(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + self.downsample(x))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C', H, W) to (N, C, ceil(H / stride), ceil(W / stride))."""
        if self.with_cp:
            return recomputed(self._block, self, x)
        return self._block(x)


class GhostStage(BaseModule):
    """A stage of which just some channels pass all blocks. Paper, Sec. 4.

    The others are made from the first block's by a cheap operation, a 1x1
    convolution, to which a vector is added that mixes what all blocks gave.

    Args:
        in_channels (int): Input channels C'.
        channels (int): Output channels C.
        depth (int): Number of blocks, at least 3.
        group_width (int): Channels per group of the first and last block's
            3x3 convolution.
        thin_group_width (int): That of the thin blocks between them.
        thin_channels (int): Channels of the thin blocks.
        norm_cfg (dict): Config of the norms.
        with_cp (bool): Whether to recompute the blocks' activations in the
            backward pass instead of storing them.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        depth: int,
        group_width: int,
        thin_group_width: int,
        thin_channels: int,
        norm_cfg: dict,
        with_cp: bool,
    ) -> None:
        super().__init__()
        cheap_channels = channels - thin_channels
        self.split_sizes = (thin_channels, cheap_channels)
        block_cfg = dict(norm_cfg=norm_cfg, with_cp=with_cp)
        self.base = Bottleneck(
            in_channels, channels, group_width, stride=2, **block_cfg
        )
        self.layers = Sequential(
            *(
                Bottleneck(
                    thin_channels, thin_channels, thin_group_width, **block_cfg
                )
                for _ in range(depth - 2)
            )
        )
        self.merge = nn.Sequential(
            nn.Identity(),  # the original pools here, after concatenating
            _conv1x1(channels + (depth - 2) * thin_channels, cheap_channels),
            build_norm_layer(norm_cfg, cheap_channels)[1],
            nn.ReLU(inplace=True),
            _conv1x1(cheap_channels, cheap_channels),
            build_norm_layer(norm_cfg, cheap_channels)[1],
        )
        self.cheap = nn.Sequential(
            _conv1x1(cheap_channels, cheap_channels),
            build_norm_layer(norm_cfg, cheap_channels)[1],
        )
        self.relu = nn.ReLU(inplace=True)
        self.end = Bottleneck(channels, channels, group_width, **block_cfg)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C', H, W) to (N, C, ceil(H / 2), ceil(W / 2))."""
        x = self.base(x)
        thin, cheap = x.split(self.split_sizes, dim=1)
        means = [F.adaptive_avg_pool2d(x, 1)]
        for block in self.layers:
            thin = block(thin)
            means.append(F.adaptive_avg_pool2d(thin, 1))
        mix = self.merge(torch.cat(means, dim=1))
        cheap = self.relu(self.cheap(cheap) + mix)
        return self.end(torch.cat((thin, cheap), dim=1))


@MODELS.register_module()
class GGhostRegNet(Backbone):
    """G-Ghost RegNet backbone.

    A PyTorch implementation of `GhostNets on Heterogeneous Devices via Cheap
    Operations <https://arxiv.org/abs/2201.03297>`_ (IJCV 2022), with the
    parameter names and the outputs of the `official code
    <https://github.com/huawei-noah/Efficient-AI-Backbones>`_.

    A RegNetX of which the stages of three blocks or more, the first one
    excepted, are :class:`GhostStage`. The official code, and so this one,
    departs from the paper in four places: the first block's output is split
    between the thin blocks and the cheap operation; the mix includes that
    output; one more full-width block ends the stage; and two 1x1 convolutions
    without bias mix, not one layer with bias.

    Args:
        arch (str | dict): The RegNetX to start from, one of '002', '004',
            '006', '008', '016', '032', '040', '064', '080', '120', '160',
            '320', its FLOPs in 100 M, or a dict with ``depths`` and
            ``widths`` (four ints each) and ``group_width`` (int). Defaults to
            '032'.
        in_channels (int): Channels of the image. Defaults to 3, as in
            ImageNet files.
        cheap_ratio (float): Part of a ghost stage's channels that are made
            cheaply, rounded up so that the others fill their groups, of 3/4
            of the group width. Defaults to 0.5.
        norm_cfg (dict): Config of all norms, such as ``dict(type='SyncBN')``.
            Defaults to ``dict(type='BN')``.
        out_indices (Sequence[int]): Stages to output, a rising selection of
            0, 1, 2, 3. What lies behind the last one is not run and does not
            require gradients. Defaults to (0, 1, 2, 3).
        frozen_stages (int): -1 freezes nothing, 0 the stem, k the stem and
            stages 1 to k: parameters and BatchNorm statistics. Defaults to
            -1.
        norm_eval (bool): Whether to keep all BatchNorms in eval mode while
            training, as with ImageNet weights. From scratch, set False and
            train with two images or more per process: ghost stages normalise
            1x1 maps. Defaults to True.
        with_cp (bool): Whether to trade time for memory by recomputing each
            block's activations in the backward pass; values, gradients and
            BatchNorm statistics stay the same. Defaults to False.
        fork_feat (bool): True for a backbone that returns feature maps, False
            for the ImageNet classifier. Defaults to True.
        num_classes (int): Classes of the classifier. Defaults to 1000.
        init_cfg (dict | list[dict], optional): Initialisation, such as what
            :meth:`init_weights` says of ImageNet files. Defaults to None:
            the official Kaiming initialisation.

    Raises:
        TypeError: If an argument is unknown.
        ValueError: If an argument, the input or a checkpoint does not fit.

    The map of stage i, from 0, has shape (N, widths[i], H', W'), where H' is
    H halved i + 2 times, each time rounded up.

    Example:
        >>> import torch
        >>> from fasternet_det import GGhostRegNet
        >>> maps = GGhostRegNet('032').eval()(torch.rand(1, 3, 224, 224))
        >>> [tuple(m.shape) for m in maps]
        [(1, 96, 56, 56), (1, 192, 28, 28), (1, 432, 14, 14), (1, 1008, 7, 7)]
    """

    # (depths, widths, group_width), those of RegNetX
    arch_settings = {
        '002': ((1, 1, 4, 7), (24, 56, 152, 368), 8),
        '004': ((1, 2, 7, 12), (32, 64, 160, 384), 16),
        '006': ((1, 3, 5, 7), (48, 96, 240, 528), 24),
        '008': ((1, 3, 7, 5), (64, 128, 288, 672), 16),
        '016': ((2, 4, 10, 2), (72, 168, 408, 912), 24),
        '032': ((2, 6, 15, 2), (96, 192, 432, 1008), 48),
        '040': ((2, 5, 14, 2), (80, 240, 560, 1360), 40),
        '064': ((2, 4, 10, 1), (168, 392, 784, 1624), 56),
        '080': ((2, 5, 15, 1), (80, 240, 720, 1920), 120),
        '120': ((2, 5, 11, 1), (224, 448, 896, 2240), 112),
        '160': ((2, 6, 13, 1), (256, 512, 896, 2048), 128),
        '320': ((2, 7, 13, 1), (336, 672, 1344, 2520), 168),
    }
    positions = stage_ends = (0, 1, 2, 3)
    layer_types = (Bottleneck,)
    stem_weight = 'conv1.weight'
    classifier_keys = {'fc.weight', 'fc.bias'}
    stem_channels = 32

    def __init__(
        self,
        arch: Union[str, dict] = '032',
        in_channels: int = 3,
        cheap_ratio: float = 0.5,
        norm_cfg: dict = dict(type='BN'),
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_eval: bool = True,
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
        depths, widths, group_width = self._parse_arch(arch)
        if not (isinstance(cheap_ratio, float) and 0 < cheap_ratio < 1):
            raise ValueError(
                f'cheap_ratio={cheap_ratio!r} is not between 0 and 1'
            )

        self.conv1 = nn.Conv2d(
            in_channels, self.stem_channels, 3, 2, padding=1, bias=False
        )
        self.bn1 = build_norm_layer(norm_cfg, self.stem_channels)[1]
        self.relu = nn.ReLU(inplace=True)
        in_channels = self.stem_channels
        for i, (depth, width) in enumerate(zip(depths, widths)):
            block_cfg = dict(
                group_width=group_width, norm_cfg=norm_cfg, with_cp=with_cp
            )
            if i == 0 or depth < 3:
                blocks = [
                    Bottleneck(in_channels, width, stride=2, **block_cfg),
                    *(
                        Bottleneck(width, width, **block_cfg)
                        for _ in range(depth - 1)
                    ),
                ]
                stage = Sequential(*blocks)
            else:
                thin_group_width = int(0.75 * group_width)
                thin_channels = thin_group_width and (
                    int((1 - cheap_ratio) * width / thin_group_width + 1e-9)
                    * thin_group_width
                )
                if not thin_channels:
                    raise ValueError(
                        f'arch={arch!r} with cheap_ratio={cheap_ratio!r} '
                        f'leaves stage {i + 1} no thin channels: expected '
                        f'{1 - cheap_ratio:g} * {width} to fill a group of '
                        f'0.75 * {group_width}, rounded down'
                    )
                stage = GhostStage(
                    in_channels,
                    width,
                    depth,
                    thin_group_width=thin_group_width,
                    thin_channels=thin_channels,
                    **block_cfg,
                )
            self.add_module(f'layer{i + 1}', stage)
            in_channels = width

        if fork_feat:
            #: Channels of the outputs, what a neck takes as ``in_channels``.
            self.out_channels = [widths[i] for i in self.out_indices]
        else:
            self.dropout = nn.Dropout(0.2)
            self.fc = nn.Linear(widths[-1], num_classes)

        self._freeze()

    def _forward(self, x: Tensor) -> Union[Tuple[Tensor, ...], Tensor]:
        x = self.relu(self.bn1(self.conv1(x)))
        outs = []
        for i, stage in enumerate(self._stages()):
            x = stage(x)
            if self.fork_feat and i in self.out_indices:
                outs.append(x)
                if i == self.out_indices[-1]:
                    return tuple(outs)
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.fc(self.dropout(x))

    @classmethod
    def _parse_arch(
        cls, arch: Union[str, dict]
    ) -> Tuple[Sequence[int], Sequence[int], int]:
        """Turn an arch into its depths, widths and group width."""
        depths, widths, group_width = parse_arch(
            arch, cls.arch_settings, ('depths', 'widths', 'group_width')
        )
        if not (
            all(isinstance(v, (list, tuple)) for v in (depths, widths))
            and len(depths) == len(widths) == 4
            and all(
                isinstance(value, int) and value > 0
                for value in (*depths, *widths, group_width)
            )
        ):
            raise ValueError(
                f'arch={arch!r} needs four depths, four widths and a '
                'group_width, all positive ints'
            )
        for width in widths:
            if width % min(width, group_width):
                raise ValueError(
                    f'arch={arch!r}: the width {width} is no multiple of the '
                    f'group_width {group_width}'
                )
        return depths, widths, group_width

    def _stages(self) -> List[nn.Module]:
        return [getattr(self, f'layer{i}') for i in range(1, 5)]

    def _stem(self) -> List[nn.Module]:
        return [self.conv1, self.bn1]

    @classmethod
    def find_arch(cls, state_dict: StateDict) -> str:
        """Find out which G-Ghost RegNet a state dict holds, by its blocks.

        Args:
            state_dict (dict[str, Tensor]): Tensors by the original's names.

        Returns:
            str: A key of ``arch_settings``, or what describes another model.
        """
        depths, widths = [], []
        for i in range(1, 5):
            blocks = {
                key: value
                for key, value in state_dict.items()
                if key.startswith(f'layer{i}.')
                and key.endswith('.conv3.weight')
            }
            if not blocks:
                return 'not a G-Ghost RegNet'
            depths.append(len(blocks))
            widths.append(max(value.shape[0] for value in blocks.values()))
        for arch, settings in cls.arch_settings.items():
            if settings[:2] == (tuple(depths), tuple(widths)):
                return arch
        return f'depths {tuple(depths)}, widths {tuple(widths)}'
