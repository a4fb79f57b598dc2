"""The fast form of a backbone, or of a detector."""

from functools import partial
from typing import Any, Dict, Iterator, Optional, Tuple

import torch
import torch.nn as nn
from mmcv.cnn import ConvModule, Scale
from mmcv.cnn.bricks.wrappers import Conv2d, ConvTranspose2d
from mmcv.ops import RoIAlign
from mmdet.models import (
    BaseDetector,
    CascadeRoIHead,
    SingleStageDetector,
    StandardRoIHead,
)
from mmdet.models.dense_heads import RPNHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.necks import FPN
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.models.roi_heads.roi_extractors.base_roi_extractor import (
    BaseRoIExtractor,
)
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

# Between a head's forward and the detections, sizes depend on values and
# precision matters.
HEADS = (BaseDenseHead, BBoxHead, FCNMaskHead)


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


def _fuse_bottlenecks(model: nn.Module) -> None:
    """Let folded Bottlenecks compute by our operators."""
    for module in model.modules():
        if type(module) is Bottleneck and all(
            isinstance(norm, nn.Identity)
            for norm in (module.bn1, module.bn2, module.bn3)
        ):
            module.__class__ = FastBottleneck
            module.conv1 = FusedConv2d(module.conv1, nn.ReLU())
            module.conv2 = FusedConv2d(module.conv2, nn.ReLU())


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


def _check(model: nn.Module, dtype: torch.dtype) -> None:
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
    if (
        (device, dtype) == ('cpu', torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        raise ValueError(
            'cannot compute in torch.bfloat16 on this CPU: it needs '
            'avx512_bf16 or amx_bf16, see `lscpu`; use torch.float32'
        )
    for name, module in model.named_modules():
        # Folding leaves no other SAConv.
        if isinstance(module, SAConv) and dtype != torch.float32:
            raise ValueError(
                f'cannot compute {name} in {dtype}: its SAConv is deformable, '
                "and mmcv's op computes in torch.float32"
            )
        of_mmcv = type(module).__module__.startswith('mmcv.ops')
        if of_mmcv and '.roi_layers.' not in name:
            raise ValueError(
                f'cannot optimise {name}: the {type(module).__name__} of mmcv '
                'takes maps in channels_last for (N, C, H, W); use fold()'
            )
    roi_head = getattr(model, 'roi_head', None)
    if dtype != torch.float32 and not (
        not isinstance(model, BaseDetector)
        or isinstance(model, SingleStageDetector)
        or type(roi_head) in (StandardRoIHead, CascadeRoIHead)
    ):
        raise ValueError(
            f'cannot compute a {type(model).__name__} with the RoI head '
            f'{type(roi_head).__name__} in {dtype}: where it decodes boxes '
            'is not known, so it stays in torch.float32'
        )


def _predictors(head: nn.Module) -> Iterator[nn.Module]:
    """The layers that give scores and deltas, by mmdet's names for them.

    Rounded to bfloat16, many scores are equal, and NMS keeps other boxes.
    """
    for name, child in head.named_children():
        predicts = name.endswith(('_cls', '_reg', '_centerness', '_obj'))
        for layer in child.modules():
            if (
                isinstance(layer, Scale)
                or predicts
                and hasattr(layer, 'weight')
            ):
                yield layer


def _set_precision(model: nn.Module, to: Dict[str, Any]) -> None:
    """Compute in a dtype and memory format, but for boxes and pooling."""
    backbone = model
    if isinstance(model, BaseDetector):
        backbone = model.backbone
        for name, child in model.named_children():
            if name != 'data_preprocessor':
                child.to(**to)
    else:
        model.to(**to)
    _cast_before(backbone, **to)
    boxes = dict(dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, HEADS):
            module.register_forward_hook(partial(_cast_output, **boxes))
            for layer in _predictors(module):
                layer.to(torch.float32)
                _cast_before(layer, **boxes)
        if isinstance(module, BaseRoIExtractor) and not _fuse_pooling(module):
            # mmcv's RoIAlign reads any memory as (N, C, H, W).
            plain = boxes | dict(memory_format=torch.contiguous_format)
            _cast_before(module, **plain)
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
    _check(model, dtype)
    if compile:
        backbone = getattr(model, 'backbone', model)
        for module in model.modules():
            if module is backbone or isinstance(module, (FPN, *HEADS)):
                module.compile()
    else:
        _fuse_rpn(getattr(model, 'rpn_head', None))
        _fuse_bottlenecks(model)
        _fuse(model, {})
    _set_precision(model, dict(dtype=dtype, memory_format=memory_format))
    return model.requires_grad_(False)
