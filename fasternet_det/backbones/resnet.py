"""mmdet's ResNet, with a slot for plug-in convolutions at every depth."""

from typing import Any, Optional

from mmdet.models.backbones import resnet
from mmdet.registry import MODELS
from mmengine.model import Sequential


class BasicBlock(resnet.BasicBlock):
    """mmdet's basic block, with the slot that its bottleneck has.

    Args:
        conv_cfg (dict, optional): Config of both 3x3 convolutions. Defaults
            to None.
        dcn (dict, optional): The same; goes before ``conv_cfg``. Defaults to
            None.
        **kwargs: The other arguments of mmdet's.
    """

    def __init__(
        self,
        conv_cfg: Optional[dict] = None,
        dcn: Optional[dict] = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(conv_cfg=dcn or conv_cfg, **kwargs)


@MODELS.register_module()
class SlotResNet(resnet.ResNet):
    """mmdet's ResNet, whose ``dcn`` slot serves depths 18 and 34 too.

    With ``dcn=dict(type='SPConv', alpha=0.5)`` or ``dcn=dict(type='SAConv')``,
    the 3x3 convolutions of the stages that ``stage_with_dcn`` names are of
    that kind, the stem and the 1x1 convolutions plain. All arguments, names
    and outputs are those of mmdet's ResNet.
    """

    arch_settings = resnet.ResNet.arch_settings | {
        18: (BasicBlock, (2, 2, 2, 2)),
        34: (BasicBlock, (3, 4, 6, 3)),
    }

    def make_res_layer(self, **kwargs: Any) -> Sequential:
        """Pack the blocks of a stage, with mmdet's initialisation of its own.

        Args:
            **kwargs: The arguments of mmdet's ``ResLayer``.

        Returns:
            Sequential: The stage.
        """
        if self.block is BasicBlock and self.zero_init_residual:
            kwargs['init_cfg'] = dict(
                type='Constant', val=0, override=dict(name='norm2')
            )
        return super().make_res_layer(**kwargs)
