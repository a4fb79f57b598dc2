"""SAConv, a convolution that switches between two dilations."""

from typing import Any, Dict, Optional, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor

Size = Union[int, Tuple[int, int]]


def _moments(weight: Tensor) -> Tuple[Tensor, Tensor]:
    """Standard deviation and mean of each filter, of shape (C, 1, 1, 1)."""
    var, mean = torch.var_mean(weight, dim=(1, 2, 3), keepdim=True)
    return (var + 1e-5).sqrt(), mean


# The root registry: those of mmdet and all others fall back to it.
@MODELS.register_module()
class ConvAWS2d(nn.Conv2d):
    """Convolution with adaptive weight standardisation.

    From `DetectoRS: Detecting Objects with Recursive Feature Pyramid and
    Switchable Atrous Convolution <https://arxiv.org/abs/2006.02334>`_ (CVPR
    2021), with the parameter names and outputs of mmcv's ``ConvAWS``. Each
    filter is standardised, then scaled by the buffer ``weight_gamma`` and
    shifted by ``weight_beta``. These are the deviation and mean of the filter
    that the layer starts with, so that it starts as a plain convolution: of a
    new one's weights, or of those that are loaded. An initialiser that fills
    ``weight`` later changes neither.

    Args:
        in_channels (int): Channels of the input.
        out_channels (int): Channels of the output.
        kernel_size (int | tuple[int]): Size of the kernel.
        stride (int | tuple[int]): Defaults to 1.
        padding (int | tuple[int]): Zeros on each side. Defaults to 0.
        dilation (int | tuple[int]): Defaults to 1.
        groups (int): Defaults to 1.
        bias (bool): Whether to add a bias. Defaults to True.

    Raises:
        ValueError: If the filters hold but one value, which has no deviation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(
            *(in_channels, out_channels, kernel_size),
            *(stride, padding, dilation, groups, bias),
        )
        if self.weight[0].numel() < 2:
            raise ValueError(
                f'{type(self).__name__} got filters of one value, which '
                'cannot be standardised: expected more than one input channel '
                'per group, or a larger kernel_size'
            )
        gamma, beta = _moments(self.weight.detach())
        self.register_buffer('weight_gamma', gamma)
        self.register_buffer('weight_beta', beta)

    def standardised_weight(self) -> Tensor:
        """Compute the weight that the layer convolves with.

        Returns:
            Tensor: Of the shape of ``weight``.
        """
        std, mean = _moments(self.weight)
        weight = (self.weight - mean) / std
        return self.weight_gamma * weight + self.weight_beta

    def forward(self, x: Tensor) -> Tensor:
        """Compute the convolution.

        Args:
            x (Tensor): Feature map of shape (N, in_channels, H, W).

        Returns:
            Tensor: What an ``nn.Conv2d`` of these arguments gives, in shape.
        """
        return self._conv_forward(x, self.standardised_weight(), self.bias)

    def _load_from_state_dict(
        self, state_dict: dict, prefix: str, *args: Any
    ) -> None:
        """Complete the state dict of a plain convolution."""
        weight = state_dict.get(f'{prefix}weight')
        if weight is not None and weight.shape == self.weight.shape:
            completion = self._completion(weight.to(self.weight.dtype))
            if not any(prefix + name in state_dict for name in completion):
                for name, value in completion.items():
                    state_dict[prefix + name] = value
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _completion(self, weight: Tensor) -> Dict[str, Tensor]:
        """What makes this a plain convolution of that weight."""
        gamma, beta = _moments(weight)
        return dict(weight_gamma=gamma, weight_beta=beta)


class _SideConv(nn.Module):
    """A small convolution that starts as a constant.

    It is no ``nn.Conv2d``: an ``init_cfg`` for these would overwrite that.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: Size = 1,
        value: float = 0.0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.zeros(out_channels, in_channels, kernel_size, kernel_size)
        )
        self.bias = nn.Parameter(torch.full((out_channels,), value))
        self.stride = stride
        self.padding = kernel_size // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)


def _reflect(x: Tensor) -> Tensor:
    """Pad all sides by 2 pixels, reflecting small maps more than once."""
    # By index, as F.pad reflects maps of 3 pixels or more only.
    for dim in (2, 3):
        last = x.shape[dim] - 1
        index = torch.arange(-2, last + 3, device=x.device).abs()
        index = (last - (last - index).abs()).abs().clamp(max=last)
        x = x.index_select(dim, index)
    return x


@MODELS.register_module()
class SAConv(ConvAWS2d):
    """Switchable atrous convolution.

    From `DetectoRS: Detecting Objects with Recursive Feature Pyramid and
    Switchable Atrous Convolution <https://arxiv.org/abs/2006.02334>`_ (CVPR
    2021, Sec. 3.2), with the parameter names and outputs of mmcv's ``SAC``.
    The same convolution at the given and at three times that dilation, the
    latter's weight changed by ``weight_diff``, mixed per pixel by a switch;
    before and after it, 1x1 convolutions add the global context. It starts as
    the first of these convolutions alone: of a new one's weights, or of a
    plain convolution's that are loaded.

    ``dict(type='SAConv')`` is a ``conv_cfg`` of necks and heads, a ``dcn`` of
    mmdet's ResNet and a ``sac`` of its DetectoRS_ResNet.

    Args:
        in_channels (int): Channels of the input.
        out_channels (int): Channels of the output.
        kernel_size (int | tuple[int]): Size of the kernel, an odd number.
        stride (int | tuple[int]): Defaults to 1.
        padding (int | tuple[int]): ``dilation * (kernel_size - 1) / 2``, so
            that both dilations give maps of one size. Defaults to 0.
        dilation (int | tuple[int]): The smaller one. Defaults to 1.
        groups (int): Defaults to 1.
        bias (bool): Whether to add a bias. Defaults to True.
        use_deform (bool): Whether both convolutions are deformable, by mmcv's
            compiled op; just for 3x3. Defaults to False.

    Raises:
        ValueError: If it cannot serve.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        use_deform: bool = False,
    ) -> None:
        super().__init__(
            *(in_channels, out_channels, kernel_size),
            *(stride, padding, dilation, groups, bias),
        )
        same = [
            dilation * (size - 1) / 2
            for size, dilation in zip(self.kernel_size, self.dilation)
        ]
        if list(self.padding) != same:
            raise ValueError(
                f'SAConv got padding={padding!r} for kernel_size='
                f'{kernel_size!r} and dilation={dilation!r}, expected an odd '
                'kernel_size and a padding of dilation * (kernel_size - 1) / 2'
            )
        if use_deform and self.kernel_size != (3, 3):
            raise ValueError(
                f'SAConv got use_deform=True for kernel_size={kernel_size!r}, '
                'expected 3'
            )
        self.use_deform = use_deform
        self.switch = _SideConv(in_channels, 1, value=1.0)
        self.weight_diff = nn.Parameter(torch.zeros_like(self.weight))
        self.pre_context = _SideConv(in_channels, in_channels)
        self.post_context = _SideConv(out_channels, out_channels)
        if use_deform:
            self.offset_s = _SideConv(in_channels, 18, 3, stride)
            self.offset_l = _SideConv(in_channels, 18, 3, stride)

    def _completion(self, weight: Tensor) -> Dict[str, Tensor]:
        completion = super()._completion(weight)
        for name, parameter in self.named_parameters():
            if name not in ('weight', 'bias'):
                completion[name] = weight.new_full(
                    parameter.shape, float(name == 'switch.bias')
                )
        return completion

    def _atrous(
        self, x: Tensor, weight: Tensor, rate: int, offset: Optional[Tensor]
    ) -> Tensor:
        """Convolve at a multiple of the dilation."""
        geometry = (
            self.stride,
            tuple(rate * size for size in self.padding),
            tuple(rate * size for size in self.dilation),
            self.groups,
        )
        if offset is None:
            return F.conv2d(x, weight, None, *geometry)
        from mmcv.ops import deform_conv2d  # compiled, so for this path alone

        # mmcv's op refuses maps under 3 pixels; beyond a map, it sees zeros.
        height, width = offset.shape[2:]
        x = F.pad(x, [0, max(3 - x.shape[3], 0), 0, max(3 - x.shape[2], 0)])
        rows, columns = (
            -(-size // stride)
            for size, stride in zip(x.shape[2:], geometry[0])
        )
        offset = F.pad(offset, [0, columns - width, 0, rows - height])
        # It takes channels_last memory for (N, C, H, W).
        tensors = (t.contiguous() for t in (x, offset, weight))
        return deform_conv2d(*tensors, *geometry)[..., :height, :width]

    def _both(
        self, x: Tensor, offset_s: Optional[Tensor], offset_l: Optional[Tensor]
    ) -> Tuple[Tensor, Tensor]:
        """Convolve at both dilations."""
        weight = self.standardised_weight()
        return (
            self._atrous(x, weight, 1, offset_s),
            self._atrous(x, weight + self.weight_diff, 3, offset_l),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Compute the convolution.

        Args:
            x (Tensor): Feature map of shape (N, in_channels, H, W).

        Returns:
            Tensor: What an ``nn.Conv2d`` of these arguments gives, in shape.
        """
        x = x + self.pre_context(x.mean((2, 3), keepdim=True))
        # Switch, then smooth, not the other way round: of one channel.
        switch = F.avg_pool2d(_reflect(self.switch(x)), 5, self.stride)
        offset_s = offset_l = None
        if self.use_deform:
            smooth = F.avg_pool2d(_reflect(x), 5, stride=1)
            offset_s, offset_l = self.offset_s(smooth), self.offset_l(smooth)
        small, large = self._both(x, offset_s, offset_l)
        out = switch * small + (1 - switch) * large
        if self.bias is not None:
            out = out + self.bias[:, None, None]
        return out + self.post_context(out.mean((2, 3), keepdim=True))
