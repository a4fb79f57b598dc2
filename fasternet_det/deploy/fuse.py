"""What computes the same as a folded module in fewer steps."""

from typing import Callable, Dict, Optional

import torch.nn as nn
from mmcv.cnn import ConvModule
from mmcv.cnn.bricks.wrappers import Conv2d, ConvTranspose2d
from mmcv.ops import RoIAlign
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor

from ..backbones.fasternet import FasterNetBlock
from ..backbones.g_ghost_regnet import Bottleneck
from ..layers import SAConv
from .fold_layers import owns_weight
from .operators import (
    FastBottleneck,
    FastRoIExtractor,
    FusedConv2d,
    FusedLinear,
    FusedUpsample,
    InPlaceBlock,
    fuses,
)

Builder = Callable[[nn.Module], Optional[nn.Module]]


def stays(module: nn.Module) -> bool:
    """Whether a module computes in float32 and (N, C, H, W) alone.

    Deformable convolutions, and the other ops of mmcv: they take any memory
    for (N, C, H, W), and fail in other dtypes.
    """
    return type(module) is SAConv or (
        type(module).__module__.startswith('mmcv.ops')
    )


def _conv(conv: nn.Conv2d) -> Optional[nn.Module]:
    if conv.padding_mode != 'zeros' or isinstance(conv.padding, str):
        return None
    return FusedConv2d(conv) if owns_weight(conv) else None


def _conv_module(module: ConvModule) -> Optional[nn.Module]:
    """A ConvModule whose norm is folded, and its activation."""
    if (
        type(module.conv) not in (nn.Conv2d, Conv2d)
        or module.with_explicit_padding
        or not isinstance(module.norm or nn.Identity(), nn.Identity)
        or module.order[-1] != 'act'
    ):
        return None
    activation = module.activate if module.with_activation else nn.Identity()
    if not fuses(activation) or _conv(module.conv) is None:
        return None
    return FusedConv2d(module.conv, activation)


def _upsample(deconv: nn.ConvTranspose2d) -> Optional[nn.Module]:
    if (
        deconv.kernel_size == deconv.stride == (2, 2)
        and deconv.dilation == (1, 1)
        and deconv.padding == deconv.output_padding == (0, 0)
        and deconv.groups == 1
    ):
        return FusedUpsample(deconv)
    return None


def _block(block: FasterNetBlock) -> Optional[nn.Module]:
    folded = isinstance(block.mlp[1], nn.Identity)
    return InPlaceBlock(block) if folded and fuses(block.mlp[2]) else None


def _bottleneck(block: Bottleneck) -> Optional[nn.Module]:
    norms = (block.bn1, block.bn2, block.bn3)
    folded = all(isinstance(norm, nn.Identity) for norm in norms)
    return FastBottleneck(block) if folded else None


def _extractor(extractor: SingleRoIExtractor) -> Optional[nn.Module]:
    if all(
        type(layer) is RoIAlign
        and layer.pool_mode == 'avg'
        and layer.sampling_ratio <= 0
        for layer in extractor.roi_layers
    ):
        return FastRoIExtractor(extractor)
    return None


# None: what is inside may have a faster form, the module itself has none.
BUILDERS: Dict[type, Builder] = {
    FasterNetBlock: _block,
    Bottleneck: _bottleneck,
    ConvModule: _conv_module,
    nn.Conv2d: _conv,
    Conv2d: _conv,
    nn.Linear: FusedLinear,
    nn.ConvTranspose2d: _upsample,
    ConvTranspose2d: _upsample,
    SingleRoIExtractor: _extractor,
}


def fuse(
    module: nn.Module,
    known: Optional[Dict[nn.Module, nn.Module]] = None,
    builders: Dict[type, Builder] = BUILDERS,
) -> nn.Module:
    """Replace what has a faster form; what is shared stays shared.

    Args:
        module (nn.Module): A folded module. What is inside is replaced in it.
        known (dict, optional): What has been replaced by what. Defaults to
            None, nothing.
        builders (dict): What makes of a module of a type what replaces it, or
            None. Defaults to the faster forms.

    Returns:
        nn.Module: The module, or what replaces it.
    """
    known = {} if known is None else known
    if module not in known:
        build = builders.get(type(module), lambda module: None)
        known[module] = build(module) or module
        if known[module] is module and not stays(module):
            for name, child in module._modules.items():
                if child is not None:
                    module._modules[name] = fuse(child, known, builders)
    return known[module]
