"""TShapedConv, FasterNet's own operator in place of a 3x3 convolution."""

import torch
import torch.nn as nn
from mmengine.registry import MODELS
from torch import Tensor
from torch.nn.modules.utils import _pair

from .plugin import PluginConv, Size


# The root registry: those of mmdet and all others fall back to it.
@MODELS.register_module()
class TShapedConv(PluginConv):
    """T-shaped convolution, in place of a 3x3 ``nn.Conv2d``.

    From `Run, Don't Walk: Chasing Higher FLOPS for Faster Neural Networks
    <https://arxiv.org/abs/2303.03667>`_ (CVPR 2023), Sec. 3.3: a partial
    convolution, 3x3 on the first ``int(ratio * in_channels)`` channels, the
    others as they are, and a 1x1 convolution of all, with nothing between
    them. It is a 3x3 convolution of a T-shaped kernel, which sees just the
    centre of the other channels: of 256 channels, it takes 102 thousand
    multiply-adds a pixel where a plain one takes 590. Not to be taken for
    another "PConv", such as the pinwheel convolution.

    ``dict(type='TShapedConv')`` is a ``conv_cfg`` of necks and heads, and a
    ``dcn`` of mmdet's ResNet. As these ask for 1x1 convolutions too, one of
    ``kernel_size=1`` is an ``nn.Conv2d``.

    Args:
        in_channels (int): Channels of the input.
        out_channels (int): Channels of the output.
        kernel_size (int | tuple[int]): 3, or 1 for an ``nn.Conv2d``.
        stride (int | tuple[int]): 1 or 2. Defaults to 1.
        padding (int | tuple[int]): As much as ``dilation``, which keeps the
            map's size. Defaults to 1.
        dilation (int | tuple[int]): Of the 3x3 convolution. Defaults to 1.
        groups (int): Just 1. Defaults to 1.
        bias (bool): Whether the 1x1 convolution has a bias. Defaults to True.
        ratio (float): The partial ratio, C_p / C in the paper. Defaults to
            0.25.

    Raises:
        ValueError: If it cannot serve.
    """

    own_options = ('ratio',)

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
        ratio: float = 0.25,
    ) -> None:
        super().__init__()
        self._check_geometry(
            kernel_size=(kernel_size, [(3, 3)]),
            stride=(stride, [(1, 1), (2, 2)]),
            padding=(padding, [_pair(dilation)]),
            groups=(groups, [(1, 1)]),
        )
        channels3 = int(ratio * in_channels)
        if not 1 <= channels3 < in_channels:
            raise ValueError(
                f'TShapedConv got in_channels={in_channels} and '
                f'ratio={ratio!r}, expected int(ratio * in_channels), which '
                f'is {channels3}, to be 1 to {in_channels - 1}: the channels '
                'of its 3x3 convolution'
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = _pair(stride)
        self.padding = _pair(padding)
        self.dilation = _pair(dilation)
        self.split_sizes = (channels3, in_channels - channels3)
        self.partial_conv3 = nn.Conv2d(
            *(channels3, channels3, 3, stride, padding, dilation), bias=False
        )
        self.pointwise_conv = nn.Conv2d(
            in_channels, out_channels, 1, bias=bias
        )

    def forward(self, x: Tensor) -> Tensor:
        """Compute the convolution.

        Args:
            x (Tensor): Feature map of shape (N, in_channels, H, W).

        Returns:
            Tensor: Of shape (N, out_channels, ceil(H / stride),
            ceil(W / stride)).
        """
        x1, x2 = x.split(self.split_sizes, dim=1)
        down, right = self.stride
        x2 = x2[:, :, ::down, ::right]  # what the kernel's centre sees
        x = torch.cat((self.partial_conv3(x1), x2), dim=1)
        return self.pointwise_conv(x)
