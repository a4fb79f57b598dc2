"""The fast form of a backbone, or of a detector."""

from functools import partial
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
from mmcv.cnn import ConvModule, Scale
from mmcv.cnn.bricks.wrappers import Conv2d, ConvTranspose2d
from mmcv.ops import RoIAlign
from mmdet.models import BaseDetector, CascadeRoIHead, StandardRoIHead
from mmdet.models.dense_heads import (
    ATSSHead,
    FCOSHead,
    FSAFHead,
    GFLHead,
    RetinaHead,
    RetinaSepBNHead,
    RPNHead,
    RTMDetHead,
    RTMDetSepBNHead,
    SSDHead,
    YOLOV3Head,
    YOLOXHead,
)
from mmdet.models.necks import FPN
from mmdet.models.roi_heads.bbox_heads import BBoxHead, ConvFCBBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from torch import Tensor

from ..backbones.fasternet import FasterNetBlock
from ..backbones.g_ghost_regnet import Bottleneck
from ..layers import SAConv
from .fold import fold
from .operators import (
    FastBottleneck,
    FastRoIAlign,
    FastRoIExtractor,
    FastRPNHead,
    FusedConv2d,
    FusedLinear,
    FusedUpsample,
    InPlaceBlock,
    fuses,
)
from .versions import check_torch

# The heads that have a fast form, and their layers that give scores and
# deltas. These compute in float32: rounded to bfloat16, many scores are equal,
# NMS keeps other boxes, and a width of 200.3 becomes 200. Masks are only
# compared with a threshold.
PREDICTORS = {
    RPNHead: ('rpn_cls', 'rpn_reg'),
    FastRPNHead: ('rpn_cls', 'rpn_reg'),
    RetinaHead: ('retina_cls', 'retina_reg'),
    RetinaSepBNHead: ('retina_cls', 'retina_reg'),
    FSAFHead: ('retina_cls', 'retina_reg'),
    FCOSHead: ('conv_cls', 'conv_reg', 'conv_centerness', 'scales'),
    ATSSHead: ('atss_cls', 'atss_reg', 'atss_centerness', 'scales'),
    GFLHead: ('gfl_cls', 'gfl_reg', 'scales'),
    RTMDetHead: ('rtm_cls', 'rtm_reg', 'rtm_obj', 'scales'),
    RTMDetSepBNHead: ('rtm_cls', 'rtm_reg', 'rtm_obj'),
    YOLOXHead: (
        'multi_level_conv_cls',
        'multi_level_conv_reg',
        'multi_level_conv_obj',
    ),
    YOLOV3Head: ('convs_pred',),
    SSDHead: ('cls_convs', 'reg_convs'),
    BBoxHead: ('fc_cls', 'fc_reg'),
    ConvFCBBoxHead: ('fc_cls', 'fc_reg'),
    FCNMaskHead: (),
}
# What stays as it is computes so; mmcv's ops read any memory as this.
PLAIN = dict(dtype=torch.float32, memory_format=torch.contiguous_format)


def _predictors(head: nn.Module) -> Optional[Tuple[str, ...]]:
    """Names of the predictors of a head, if it is one that we know.

    A subclass is known if it computes what its base does.
    """
    for base in type(head).__mro__:
        if base in PREDICTORS and all(
            getattr(type(head), name, None) is getattr(base, name, None)
            for name in ('forward', 'forward_single')
        ):
            return PREDICTORS[base]
    return None


def _predicting_layers(head: nn.Module) -> List[nn.Module]:
    """The layers of a head's predictors, the scales behind them too."""
    return [
        layer
        for name in _predictors(head) or ()
        if hasattr(head, name)  # some are optional, such as objectness
        for layer in getattr(head, name).modules()
        if isinstance(layer, Scale) or hasattr(layer, 'weight')
    ]


def _is_of_mmcv(module: nn.Module) -> bool:
    return type(module).__module__.startswith('mmcv.ops')


def _is_known(head: nn.Module) -> bool:
    """Whether all of a head has a fast form."""
    if type(head) in (StandardRoIHead, CascadeRoIHead, nn.ModuleList):
        return all(map(_is_known, head.children()))
    if type(head) is SingleRoIExtractor:
        return True
    return _predictors(head) is not None and not any(
        map(_is_of_mmcv, head.modules())
    )


def _split(model: nn.Module) -> Tuple[List[nn.Module], List[nn.Module]]:
    """Split a model into what gets a fast form and what stays as it is.

    The heads of a detector read each other's outputs, so that one of which
    nothing is known leaves all as they are.
    """
    if not isinstance(model, BaseDetector):
        return [model], []
    if not hasattr(model, 'backbone'):
        raise ValueError(
            f'cannot optimise a {type(model).__name__}, which holds whole '
            'detectors: optimise the one that predicts'
        )
    maps = [model.backbone, *([model.neck] if model.with_neck else [])]
    others = (*maps, model.data_preprocessor)
    heads = [child for child in model.children() if child not in others]
    if all(map(_is_known, heads)):
        return maps + heads, []
    return maps, heads


def _is_plain(conv: nn.Module) -> bool:
    """Whether a module is a convolution that one kernel can do."""
    return (
        type(conv) in (nn.Conv2d, Conv2d)
        and conv.padding_mode == 'zeros'
        and not isinstance(conv.padding, str)
    )


def _fused(module: nn.Module) -> Optional[nn.Module]:
    """What computes the same as a folded module in fewer steps, if known."""
    if isinstance(module, FasterNetBlock) and fuses(module.mlp[2]):
        return InPlaceBlock(module)
    if _is_plain(module):
        return FusedConv2d(module)
    if type(module) is nn.Linear:
        return FusedLinear(module)
    if (
        type(module) in (nn.ConvTranspose2d, ConvTranspose2d)
        and module.kernel_size == module.stride == (2, 2)
        and module.dilation == (1, 1)
        and module.padding == module.output_padding == (0, 0)
        and module.groups == 1
    ):
        return FusedUpsample(module)
    if (
        type(module) is ConvModule
        and _is_plain(module.conv)
        and not module.with_explicit_padding
        and isinstance(module.norm or nn.Identity(), nn.Identity)
        and module.order[-1] == 'act'
    ):
        activation = module.activate if module.with_activation else None
        if activation is None or fuses(activation):
            return FusedConv2d(module.conv, activation)
    return None


def _fuse(module: nn.Module, known: Dict[nn.Module, nn.Module]) -> None:
    """Replace what is inside a module; what is shared stays shared."""
    for name, child in module.named_children():
        if child not in known:
            known[child] = _fused(child)
        if known[child] is None:
            _fuse(child, known)
        else:
            setattr(module, name, known[child])


def _fuse_bottlenecks(part: nn.Module) -> None:
    """Let folded Bottlenecks compute by our operators."""
    for module in part.modules():
        if type(module) is Bottleneck and all(
            isinstance(norm, nn.Identity)
            for norm in (module.bn1, module.bn2, module.bn3)
        ):
            module.__class__ = FastBottleneck
            module.conv1 = FusedConv2d(module.conv1, nn.ReLU())
            module.conv2 = FusedConv2d(module.conv2, nn.ReLU())


def _compile(part: nn.Module) -> None:
    """Compile necks and the forwards of heads.

    Between those and the detections, sizes depend on values.
    """
    for module in part.modules():
        if isinstance(module, FPN) or _predictors(module) is not None:
            module.compile()


def _cast(value: Any, **to: Any) -> Any:
    """Cast the tensors in nested lists and tuples."""
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(v, **to) for v in value)
    return value.to(**to) if isinstance(value, Tensor) else value


def _cast_input(
    module: nn.Module, args: tuple, kwargs: Dict[str, Any], **to: Any
) -> Tuple[tuple, Dict[str, Any]]:
    named = {name: _cast(value, **to) for name, value in kwargs.items()}
    return _cast(args, **to), named


def _cast_before(module: nn.Module, **to: Any) -> None:
    """Cast what a module is called with, by position or by keyword."""
    cast = partial(_cast_input, **to)
    module.register_forward_pre_hook(cast, with_kwargs=True)


def _cast_output(
    module: nn.Module, args: tuple, output: Any, **to: Any
) -> Any:
    return _cast(output, **to)


def _fuse_rpn(head: nn.Module) -> None:
    """Let an RPN head predict by our operators, where it can."""
    if type(head) is RPNHead and _is_plain(head.rpn_conv):
        head.__class__ = FastRPNHead
        head.rpn_conv = FusedConv2d(head.rpn_conv, nn.ReLU())


def _fuse_pooling(extractor: SingleRoIExtractor) -> bool:
    """Let a RoI extractor pool by our operators, where they can."""
    layers = extractor.roi_layers
    if type(extractor) is not SingleRoIExtractor or any(
        type(layer) is not RoIAlign
        or layer.pool_mode != 'avg'
        or layer.sampling_ratio > 0
        for layer in layers
    ):
        return False
    # The state is the same: only the forwards differ.
    extractor.__class__ = FastRoIExtractor
    for layer in layers:
        layer.__class__ = FastRoIAlign
    return True


def _has_bfloat16() -> bool:
    """Whether oneDNN is there and computes in bfloat16 on this CPU."""
    # A torch built without oneDNN lacks the operator too.
    supported = getattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', None)
    return bool(
        torch.backends.mkldnn.is_available() and supported and supported()
    )


def _check(
    model: nn.Module, fast: List[nn.Module], dtype: torch.dtype
) -> None:
    """Refuse what cannot be computed in a dtype."""
    device = next(model.parameters()).device.type
    dtypes = [torch.float32, torch.bfloat16]
    if device == 'cuda':
        dtypes.append(torch.float16)
    if dtype not in dtypes:
        raise ValueError(
            f'cannot compute in {dtype} on {device}, expected one of '
            f'{", ".join(map(str, dtypes))}'
        )
    # oneDNN's kernels fail at the first image without.
    if (device, dtype) == ('cpu', torch.bfloat16) and not _has_bfloat16():
        raise ValueError(
            'cannot compute in torch.bfloat16 on this CPU: it needs '
            'avx512_bf16 or amx_bf16, see `lscpu`, and a torch with oneDNN; '
            'use torch.float32'
        )
    inside = {module for part in fast for module in part.modules()}
    for name, module in model.named_modules():
        if module not in inside:
            continue
        # Folding leaves no other SAConv.
        if isinstance(module, SAConv) and dtype != torch.float32:
            raise ValueError(
                f'cannot compute {name} in {dtype}: its SAConv is deformable, '
                "and mmcv's op computes in torch.float32"
            )
        if _is_of_mmcv(module) and '.roi_layers.' not in name:
            raise ValueError(
                f'cannot optimise {name}: the {type(module).__name__} of mmcv '
                'takes maps in channels_last for (N, C, H, W); use fold()'
            )


def _set_precision(
    part: nn.Module, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    """Compute in a dtype and memory format, but for boxes and pooling."""
    to = dict(dtype=dtype, memory_format=memory_format)
    boxes = dict(dtype=torch.float32)
    predicting = [
        layer for head in part.modules() for layer in _predicting_layers(head)
    ]
    part.to(memory_format=memory_format)
    # There and back again, they would be rounded.
    unrounded = [(p, p.data) for m in predicting for p in m.parameters()]
    part.to(dtype)
    for parameter, data in unrounded:
        parameter.data = data.float()
    for layer in predicting:
        _cast_before(layer, **boxes)
    for module in part.modules():
        if _predictors(module) is not None:
            module.register_forward_hook(partial(_cast_output, **boxes))
        if type(module) is SingleRoIExtractor and not _fuse_pooling(module):
            _cast_before(module, **PLAIN)
            module.register_forward_hook(partial(_cast_output, **to))


@torch.no_grad()
def optimize(
    model: nn.Module,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.channels_last,
    compile: bool = False,
) -> nn.Module:
    """Make the fast form of a backbone of ours, or of what holds one.

    BatchNorms are folded (:func:`fold`), weights laid out for the processor,
    activations and residuals fused into the convolutions, partial
    convolutions computed in place. The result has the interface of the
    model: ``DetInferencer``, ``inference_detector`` and mmdet's test loop run
    it unchanged.

    Args:
        model (nn.Module): A backbone, layer or mmdet detector that
            :func:`fold` takes, in eval mode. It is left as it is.
        dtype (torch.dtype): In which to compute: float32 (outputs equal the
            model's to 1e-5 relative), bfloat16, or float16 on CUDA. Boxes are
            predicted, decoded, suppressed and pooled from in float32 anyway.
            Defaults to float32.
        memory_format (torch.memory_format): Layout of weights and image.
            oneDNN, on CPUs, gives maps in channels_last from either.
            Defaults to ``torch.channels_last``.
        compile (bool): Whether to leave the fusing to ``torch.compile``, which
            takes minutes at the first call. Defaults to False.

    Returns:
        nn.Module: A copy for inference, without gradients. A bare backbone's
        maps are of ``dtype``.

    Raises:
        RuntimeError: If torch is older than 2.6.
        ValueError: If the model cannot be folded, or not be computed in
            ``dtype``.
    """
    check_torch('optimize')
    model = fold(model)
    fast, plain = _split(model)
    _check(model, fast, dtype)
    fused: Dict[nn.Module, Optional[nn.Module]] = {}
    if compile:
        fast[0].compile()  # the backbone
    for part in fast:
        if compile:
            _compile(part)
        else:
            _fuse_rpn(part)
            _fuse_bottlenecks(part)
            _fuse(part, fused)
    for part in fast:
        _set_precision(part, dtype, memory_format)
    _cast_before(fast[0], dtype=dtype, memory_format=memory_format)
    if plain:
        fast[-1].register_forward_hook(partial(_cast_output, **PLAIN))
    for part in plain:
        part.to(**PLAIN)
    return model.requires_grad_(False)
