"""mmdet's ResNet, with a slot for plug-in convolutions at every depth."""

from typing import Any, Optional, Tuple, Union

from mmdet.models.backbones import resnet
from mmdet.registry import MODELS
from mmengine.model import Sequential
from torch import Tensor

from .base import (
    LayerDepth,
    frozen_norms,
    starts_training,
    warn_of_frozen_norms,
)


class BasicBlock(resnet.BasicBlock):
    """mmdet's basic block, with the slot that its bottleneck has.

    Args:
        conv_cfg (dict, optional): Config of both 3x3 convolutions. Defaults
            to None.
        dcn (dict, optional): The same, but for ``fallback_on_stride``, which
            leaves them to ``conv_cfg``. Defaults to None.
        **kwargs: The other arguments of mmdet's.

    Raises:
        ValueError: If both are given.
    """

    def __init__(
        self,
        conv_cfg: Optional[dict] = None,
        dcn: Optional[dict] = None,
        **kwargs: Any,
    ) -> None:
        slot = dict(dcn or {})
        if slot and not slot.pop('fallback_on_stride', False):
            if conv_cfg:
                raise ValueError(
                    f'got conv_cfg={conv_cfg!r} and dcn={dcn!r} for the same '
                    '3x3 convolutions, expected one of them'
                )
            conv_cfg = slot
        super().__init__(conv_cfg=conv_cfg, **kwargs)


@MODELS.register_module()
class SlotResNet(LayerDepth, resnet.ResNet):
    """mmdet's ResNet, whose ``dcn`` slot serves depths 18 and 34 too.

    With ``dcn=dict(type='SPConv', alpha=0.5)`` or ``dcn=dict(type='SAConv')``,
    the 3x3 convolutions of the stages that ``stage_with_dcn`` names are of
    that kind, the stem and the 1x1 convolutions plain. All arguments, names
    and outputs are those of mmdet's ResNet.
    """

    layer_types = (resnet.BasicBlock, resnet.Bottleneck)
    arch_settings = resnet.ResNet.arch_settings | {
        18: (BasicBlock, (2, 2, 2, 2)),
        34: (BasicBlock, (3, 4, 6, 3)),
    }

    def __init__(
        self,
        *args: Any,
        init_cfg: Union[dict, list, None] = None,
        **kwargs: Any,
    ) -> None:
        self._given_init = bool(init_cfg or kwargs.get('pretrained'))
        super().__init__(*args, init_cfg=init_cfg, **kwargs)

    def make_res_layer(self, **kwargs: Any) -> Sequential:
        """Pack the blocks of a stage, with mmdet's initialisation of its own.

        Args:
            **kwargs: The arguments of mmdet's ``ResLayer``.

        Returns:
            Sequential: The stage.
        """
        # mmdet's condition, but for the class.
        if (
            self.block is BasicBlock
            and self.zero_init_residual
            and not self._given_init
        ):
            kwargs['init_cfg'] = dict(
                type='Constant', val=0, override=dict(name='norm2')
            )
        return super().make_res_layer(**kwargs)

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        """Compute mmdet's feature maps.

        Args:
            x (Tensor): Image batch of shape (N, in_channels, H, W).

        Returns:
            tuple[Tensor]: A map of shape (N, C, H', W') per ``out_indices``.
        """
        # Weights of a plain ResNet leave the norms of plug-ins as they are.
        if starts_training(self, x) and any(frozen_norms(self).values()):
            warn_of_frozen_norms(self)
        return super().forward(x)
