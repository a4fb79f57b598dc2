"""What computes the same as a folded module in fewer steps."""

from typing import Callable, Dict, Optional

import torch.nn as nn
from mmcv.cnn import ConvModule
from mmcv.cnn.bricks.wrappers import Conv2d, ConvTranspose2d
from mmcv.ops import RoIAlign
from mmdet.models.dense_heads import RPNHead
from mmdet.models.necks import FPN
from mmdet.models.roi_heads.bbox_heads import (
    ConvFCBBoxHead,
    Shared2FCBBoxHead,
    Shared4Conv1FCBBoxHead,
)
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor

from ..backbones.fasternet import FasterNetBlock
from ..backbones.g_ghost_regnet import Bottleneck
from ..backbones.ghostnet import ConvBnAct, GhostBottleneck
from ..layers import SAConv, TShapedConv
from ..rpn_head import SlotRPNHead
from .blocks import FastFPN, FastGhostBottleneck, FastTShapedConv
from .fold_layers import owns_weight
from .operators import (
    FastBottleneck,
    FastRoIExtractor,
    FlattenPixels,
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


def _conv(
    conv: nn.Module, activation: Optional[nn.Module] = None
) -> Optional[nn.Module]:
    """A convolution, and an activation that :func:`fuses`."""
    if type(conv) is TShapedConv:
        parts = (conv.partial_conv3, conv.pointwise_conv)
        return FastTShapedConv(conv, activation) if _plain(*parts) else None
    return FusedConv2d(conv, activation) if _plain(conv) else None


def _plain(*convs: nn.Module) -> bool:
    """Whether convolutions have zeros around and a weight of their own."""
    return all(
        type(conv) in (nn.Conv2d, Conv2d)
        and conv.padding_mode == 'zeros'
        and not isinstance(conv.padding, str)
        and owns_weight(conv)
        for conv in convs
    )


def _conv_module(module: ConvModule) -> Optional[nn.Module]:
    """A ConvModule whose norm is folded, and its activation."""
    if (
        module.with_explicit_padding
        or not isinstance(module.norm or nn.Identity(), nn.Identity)
        or module.order[-1] != 'act'
    ):
        return None
    activation = module.activate if module.with_activation else nn.Identity()
    return _conv(module.conv, activation) if fuses(activation) else None


def _rpn_head(head: RPNHead) -> None:
    """Make the ReLU that it calls a part of the convolution before."""
    head.rpn_conv = _conv(head.rpn_conv, nn.ReLU()) or head.rpn_conv


def _bbox_head(head: ConvFCBBoxHead) -> None:
    """Let its first linear layer read the regions as they lie."""
    linear = next(iter(head.shared_fcs), None)
    if (
        type(linear) is nn.Linear
        and owns_weight(linear)
        and not head.with_avg_pool
    ):
        weight = linear.weight.unflatten(1, (-1, head.roi_feat_area))
        linear.weight = nn.Parameter(weight.transpose(1, 2).flatten(1))
        head.shared_convs.append(FlattenPixels())
        head.num_shared_convs += 1


def _mask_head(head: FCNMaskHead) -> None:
    """Make the ReLU that it calls a part of the layer before."""
    if head.upsample_method == 'deconv':
        head.upsample = _upsample(head.upsample, head.relu) or head.upsample


def _upsample(
    deconv: nn.ConvTranspose2d, activation: Optional[nn.Module] = None
) -> Optional[nn.Module]:
    if (
        deconv.kernel_size == deconv.stride == (2, 2)
        and deconv.dilation == (1, 1)
        and deconv.padding == deconv.output_padding == (0, 0)
        and deconv.groups == 1
        and owns_weight(deconv)
    ):
        return FusedUpsample(deconv, activation)
    return None


def _linear(linear: nn.Linear) -> Optional[nn.Module]:
    return FusedLinear(linear) if owns_weight(linear) else None


def _block(block: FasterNetBlock) -> Optional[nn.Module]:
    folded = isinstance(block.mlp[1], nn.Identity)
    return InPlaceBlock(block) if folded and fuses(block.mlp[2]) else None


def _bottleneck(block: Bottleneck) -> Optional[nn.Module]:
    norms = (block.bn1, block.bn2, block.bn3)
    folded = all(isinstance(norm, nn.Identity) for norm in norms)
    return FastBottleneck(block) if folded else None


def _ghost_bottleneck(block: GhostBottleneck) -> Optional[nn.Module]:
    norms = [
        block.bn_dw,
        *(m[1] for g in (block.ghost1, block.ghost2) for m in g.children()),
        *block.shortcut[1::2],
    ]
    folded = all(isinstance(norm, nn.Identity) for norm in norms)
    return FastGhostBottleneck(block) if folded else None


def _conv_bn_act(module: ConvBnAct) -> Optional[nn.Module]:
    folded = isinstance(module.bn1, nn.Identity)
    return FusedConv2d(module.conv, module.act) if folded else None


def _extractor(extractor: SingleRoIExtractor) -> Optional[nn.Module]:
    if all(
        type(layer) is RoIAlign
        and layer.pool_mode == 'avg'
        and layer.sampling_ratio <= 0
        for layer in extractor.roi_layers
    ):
        return FastRoIExtractor(extractor)
    return None


def _fpn(fpn: FPN) -> Optional[nn.Module]:
    fuse(fpn.lateral_convs)
    fuse(fpn.fpn_convs)
    return FastFPN(fpn) if fpn.upsample_cfg == dict(mode='nearest') else None


# None: what is inside has a faster form, or may; the module itself has none.
BUILDERS: Dict[type, Builder] = {
    FasterNetBlock: _block,
    Bottleneck: _bottleneck,
    GhostBottleneck: _ghost_bottleneck,
    ConvBnAct: _conv_bn_act,
    TShapedConv: _conv,
    ConvModule: _conv_module,
    nn.Conv2d: _conv,
    Conv2d: _conv,
    nn.Linear: _linear,
    nn.ConvTranspose2d: _upsample,
    ConvTranspose2d: _upsample,
    FPN: _fpn,
    SingleRoIExtractor: _extractor,
    RPNHead: _rpn_head,
    SlotRPNHead: _rpn_head,
    ConvFCBBoxHead: _bbox_head,
    Shared2FCBBoxHead: _bbox_head,
    Shared4Conv1FCBBoxHead: _bbox_head,
    FCNMaskHead: _mask_head,
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
