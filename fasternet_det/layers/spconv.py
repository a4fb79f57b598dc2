"""SPConv, a slimmer 3x3 convolution."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmengine.registry import MODELS
from torch import Tensor
from torch.nn.modules.utils import _pair

from .plugin import PluginConv, Size


def halve(x: Tensor) -> Tensor:
    """Average 2x2 pixels, with zeros below and right of odd sides.

    Args:
        x (Tensor): Feature map of shape (N, C, H, W).

    Returns:
        Tensor: Of shape (N, C, ceil(H / 2), ceil(W / 2)), as a padded 3x3
        convolution of stride 2 gives, and as such one can compute it.
    """
    return F.avg_pool2d(F.pad(x, (0, 1, 0, 1)), 2)


def mixing_weights(x: Tensor, y: Tensor) -> Tensor:
    """Weigh two maps by the softmax over their global averages, per channel.

    Args:
        x (Tensor): Feature map of shape (N, C, H, W).
        y (Tensor): Another one of that shape.

    Returns:
        Tensor: Both weights, of shape (2, N, C, 1, 1).
    """
    means = [z.mean((2, 3), keepdim=True) for z in (x, y)]
    return torch.stack(means).softmax(dim=0)


# The root registry: those of mmdet and all others fall back to it.
@MODELS.register_module()
class SPConv(PluginConv):
    """Split-based convolution, in place of a 3x3 ``nn.Conv2d``.

    From `Split to Be Slim: An Overlooked Redundancy in Vanilla Convolution
    <https://arxiv.org/abs/2006.12085>`_ (IJCAI 2020), with the parameter
    names and the outputs of the `official code
    <https://github.com/qiulinzhang/SPConv.pytorch>`_. The first
    ``int(alpha * in_channels)`` channels go through a 3x3 convolution of two
    groups and a 1x1 convolution, added and normalised; the others through a
    1x1 convolution with bias and a norm. Both reach all output channels, where
    they are mixed by their :func:`mixing_weights`.

    ``dict(type='SPConv', alpha=0.5)`` is a ``conv_cfg`` of necks and heads,
    and a ``dcn`` of mmdet's ResNet. As these ask for 1x1 convolutions too, of
    which there is nothing to slim, one of ``kernel_size=1`` is an
    ``nn.Conv2d``.

    Args:
        in_channels (int): Channels of the input.
        out_channels (int): Channels of the output, an even number.
        kernel_size (int | tuple[int]): 3, or 1 for an ``nn.Conv2d``.
        stride (int | tuple[int]): 1 or 2. At 2, :func:`halve` precedes the 1x1
            convolutions. Defaults to 1.
        padding (int | tuple[int]): Just 1. Defaults to 1.
        dilation (int | tuple[int]): Just 1. Defaults to 1.
        groups (int): Just 1. Defaults to 1.
        bias (bool): Of no effect: the norms' biases serve. Defaults to True.
        alpha (float): Part of the input channels that the 3x3 convolution
            sees, an even number of them. Defaults to 0.5.
        norm_cfg (dict): Config of the norms. Defaults to ``dict(type='BN')``.

    Raises:
        ValueError: If it cannot serve.
    """

    own_options = ('alpha', 'norm_cfg')
    padding = (1, 1)
    dilation = (1, 1)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 1,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        alpha: float = 0.5,
        norm_cfg: dict = dict(type='BN'),
    ) -> None:
        super().__init__()
        self._check_geometry(
            kernel_size=(kernel_size, [(3, 3)]),
            stride=(stride, [(1, 1), (2, 2)]),
            padding=(padding, [(1, 1)]),
            dilation=(dilation, [(1, 1)]),
            groups=(groups, [(1, 1)]),
        )
        if not 0 < alpha < 1:
            raise ValueError(f'SPConv got alpha={alpha!r}, not in (0, 1)')
        channels3 = int(alpha * in_channels)
        if channels3 < 2 or channels3 % 2 or out_channels % 2:
            raise ValueError(
                f'SPConv got in_channels={in_channels}, '
                f'out_channels={out_channels} and alpha={alpha}, expected '
                'positive even numbers of out_channels and of int(alpha * '
                f'in_channels), which is {channels3}: its 3x3 convolution has '
                'two groups'
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = _pair(stride)
        self.split_sizes = (channels3, in_channels - channels3)
        self.gwc = nn.Conv2d(
            channels3, out_channels, 3, stride, padding=1, groups=2, bias=False
        )
        self.pwc = nn.Conv2d(channels3, out_channels, 1, bias=False)
        self.conv1x1 = nn.Conv2d(self.split_sizes[1], out_channels, 1)
        self.bn1 = build_norm_layer(norm_cfg, out_channels)[1]
        self.bn2 = build_norm_layer(norm_cfg, out_channels)[1]

    def forward(self, x: Tensor) -> Tensor:
        """Compute the convolution.

        Args:
            x (Tensor): Feature map of shape (N, in_channels, H, W).

        Returns:
            Tensor: Of shape (N, out_channels, ceil(H / stride),
            ceil(W / stride)).
        """
        y = self.gwc(x[:, : self.split_sizes[0]])
        if self.stride == (2, 2):
            x = halve(x)
        x3, x1 = x.split(self.split_sizes, dim=1)
        y, z = self.bn1(y + self.pwc(x3)), self.bn2(self.conv1x1(x1))
        weights = mixing_weights(y, z)
        return weights[0] * y + weights[1] * z
