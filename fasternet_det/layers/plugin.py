"""What the layers in the place of a 3x3 convolution share."""

from typing import Any, Tuple, Union

import torch.nn as nn
from torch.nn.modules.utils import _pair

Size = Union[int, Tuple[int, int]]


class PluginConv(nn.Module):
    """A layer in the place of a padded 3x3 ``nn.Conv2d``.

    As a ``conv_cfg`` or ``dcn`` is asked for 1x1 convolutions too, one of
    ``kernel_size=1`` is an ``nn.Conv2d``.
    """

    #: Options that an ``nn.Conv2d`` does not have.
    own_options: Tuple[str, ...]
    # What mmcv's ConvModule reads, beside what a subclass sets.
    kernel_size = (3, 3)
    output_padding = (0, 0)
    groups = 1
    transposed = False

    def __new__(cls, *args: Any, **kwargs: Any) -> nn.Module:
        """Make such a layer, or an ``nn.Conv2d`` of kernel size 1."""
        kernel_size = kwargs.get('kernel_size', *args[2:3])
        if kernel_size not in (1, (1, 1)):
            return super().__new__(cls)
        for name in cls.own_options:
            kwargs.pop(name, None)
        return nn.Conv2d(*args, **kwargs)

    def _check_geometry(self, **arguments: Tuple[Size, list]) -> None:
        """Refuse what it cannot be.

        Args:
            **arguments: Each argument's value, and the pairs that serve.

        Raises:
            ValueError: If one is none of them.
        """
        for name, (value, served) in arguments.items():
            if _pair(value) not in served:
                raise ValueError(
                    f'{type(self).__name__} got {name}={value!r}, expected '
                    f'{" or ".join(str(pair[0]) for pair in served)}: it '
                    'stands in for padded 3x3 convolutions, of stride 1 or 2'
                )
