"""mmdet's RPNHead, with a slot for plug-in convolutions."""

from typing import Any, Optional

from mmcv.cnn import build_conv_layer
from mmdet.models.dense_heads import RPNHead
from mmdet.registry import MODELS


@MODELS.register_module()
class SlotRPNHead(RPNHead):
    """mmdet's RPNHead, with the ``conv_cfg`` that its other heads have.

    Args:
        *args: The arguments of mmdet's.
        conv_cfg (dict, optional): Config of the 3x3 convolution, such as
            ``dict(type='TShapedConv')``. Defaults to None, a plain one.
        **kwargs: The other arguments of mmdet's.

    Raises:
        ValueError: If there is to be more than one such convolution.
    """

    def __init__(
        self, *args: Any, conv_cfg: Optional[dict] = None, **kwargs: Any
    ) -> None:
        self.conv_cfg = conv_cfg
        super().__init__(*args, **kwargs)

    def _init_layers(self) -> None:
        if self.num_convs != 1:
            raise ValueError(
                f'SlotRPNHead got num_convs={self.num_convs}, expected 1: use '
                "mmdet's RPNHead for more"
            )
        super()._init_layers()
        self.rpn_conv = build_conv_layer(
            *(self.conv_cfg, self.in_channels, self.feat_channels, 3),
            padding=1,
        )
