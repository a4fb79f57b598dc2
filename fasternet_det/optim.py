"""Layer-wise learning-rate decay for the backbone of a detector."""

from typing import Any, List, Optional

import torch.nn as nn
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS


# The root registry: those of mmdet and all others fall back to it.
@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's constructor, with lower learning rates for early layers.

    A parameter of the backbone at depth d of L layers, by its
    ``get_layer_depth``, learns at ``layer_decay_rate ** (L - 1 - d)`` times
    the rate that it would have; all others at their own. From `BEiT
    <https://arxiv.org/abs/2106.08254>`_, Appendix; mmdet's own knows
    ConvNeXt's names alone.

    Args:
        optim_wrapper_cfg (dict): Config of the optimizer and its wrapper.
        paramwise_cfg (dict): All options of mmengine's
            ``DefaultOptimWrapperConstructor``, such as ``norm_decay_mult``
            and ``custom_keys``, and ``layer_decay_rate`` (float), above 0 and
            at most 1.

    Raises:
        ValueError: If there is no such rate or no ``lr``, or the model's
            backbone does not know the depth of its layers.

    Example:
        >>> optim_wrapper = dict(
        >>>     constructor='LayerDecayOptimWrapperConstructor',
        >>>     optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
        >>>     paramwise_cfg=dict(layer_decay_rate=0.9, norm_decay_mult=0))
    """

    def __init__(
        self, optim_wrapper_cfg: dict, paramwise_cfg: Optional[dict] = None
    ) -> None:
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        rate = self.paramwise_cfg.get('layer_decay_rate')
        if not isinstance(rate, (int, float)) or not 0 < rate <= 1:
            raise ValueError(
                f'paramwise_cfg={paramwise_cfg!r}: expected a '
                'layer_decay_rate above 0 and at most 1, such as 0.9'
            )
        if self.base_lr is None:
            raise ValueError(
                f'optimizer={self.optimizer_cfg!r} has no lr, of which '
                'layer_decay_rate is a part: expected one such as lr=1e-4'
            )

    def add_params(
        self,
        params: List[dict],
        module: nn.Module,
        prefix: str = '',
        **kwargs: Any,
    ) -> None:
        """Add the groups of a module's parameters, one each.

        Args:
            params (list[dict]): The groups so far; is extended.
            module (nn.Module): The module.
            prefix (str): Its name in the model. Defaults to ``''``, the model
                itself.
            **kwargs: Between mmengine's own calls.
        """
        super().add_params(params, module, prefix, **kwargs)
        if prefix:
            return
        backbone = getattr(module, 'backbone', module)
        if not hasattr(backbone, 'get_layer_depth'):
            raise ValueError(
                f'{type(backbone).__name__} has no get_layer_depth, expected '
                'a backbone that knows the depth of its layers, such as '
                'FasterNet: use another constructor'
            )
        depths = {
            parameter: backbone.get_layer_depth(name)
            for name, parameter in backbone.named_parameters()
        }
        for group in params:
            (parameter,) = group['params']
            if parameter in depths:
                depth, layers = depths[parameter]
                scale = self.paramwise_cfg['layer_decay_rate'] ** (
                    layers - 1 - depth
                )
                group['lr'] = group.get('lr', self.base_lr) * scale
