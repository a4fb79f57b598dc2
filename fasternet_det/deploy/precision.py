"""Where each part of a model computes: in which dtype and memory format."""

import re
from functools import partial
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn
from mmcv.cnn import Scale
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
    RTMDetInsHead,
    RTMDetInsSepBNHead,
    RTMDetSepBNHead,
    SSDHead,
    YOLOV3Head,
    YOLOXHead,
)
from mmdet.models.roi_heads.bbox_heads import BBoxHead, ConvFCBBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from torch import Tensor

from .fuse import stays
from .operators import FusedConv2d, Packed, Predictor

# The heads that have a fast form, and their layers that give scores and
# deltas. These compute in float32: rounded to bfloat16, many scores are equal,
# NMS keeps other boxes, and a width of 200.3 becomes 200. Masks are only
# compared with a threshold.
PREDICTORS: Dict[type, Tuple[str, ...]] = {
    RPNHead: ('rpn_cls', 'rpn_reg'),
    RetinaHead: ('retina_cls', 'retina_reg'),
    RetinaSepBNHead: ('retina_cls', 'retina_reg'),
    FSAFHead: ('retina_cls', 'retina_reg'),
    FCOSHead: ('conv_cls', 'conv_reg', 'conv_centerness', 'scales'),
    ATSSHead: ('atss_cls', 'atss_reg', 'atss_centerness', 'scales'),
    GFLHead: ('gfl_cls', 'gfl_reg', 'scales'),
    RTMDetHead: ('rtm_cls', 'rtm_reg', 'rtm_obj', 'scales'),
    RTMDetSepBNHead: ('rtm_cls', 'rtm_reg', 'rtm_obj'),
    RTMDetInsHead: ('rtm_cls', 'rtm_reg', 'rtm_kernel', 'rtm_obj', 'scales'),
    RTMDetInsSepBNHead: ('rtm_cls', 'rtm_reg', 'rtm_kernel', 'rtm_obj'),
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
# Names of the methods that make detections of maps.
DECODING = re.compile(
    r'predict(?!or|ion)|post_process|_forward$|_refine_roi|regress_by_class'
)
# What stays as it is computes so; mmcv's ops read any memory as this.
PLAIN = dict(dtype=torch.float32, memory_format=torch.contiguous_format)


def predictors(head: nn.Module) -> Optional[Tuple[str, ...]]:
    """Name the predictors of a head, if it is one that we know.

    A subclass is known if it computes what its base does.

    Args:
        head (nn.Module): Any module.

    Returns:
        tuple[str] | None: Attributes of the head; None if it is unknown.
    """
    for base in type(head).__mro__:
        if base in PREDICTORS and all(
            getattr(type(head), name, None) is getattr(base, name, None)
            for name in ('forward', 'forward_single')
        ):
            return PREDICTORS[base]
    return None


def decodes_as(module: nn.Module, owner: type) -> bool:
    """Whether a module makes detections by the methods of a class of mmdet.

    Args:
        module (nn.Module): A detector, a head, or a part of one.
        owner (type): The class. A subclass may train in another way.
    """
    return isinstance(module, owner) and all(
        getattr(type(module), name) is getattr(owner, name, None)
        for name in filter(DECODING.search, dir(type(module)))
    )


def _is_known(head: nn.Module) -> bool:
    """Whether all of a head has a fast form."""
    if isinstance(head, nn.ModuleList) or any(
        decodes_as(head, owner) for owner in (StandardRoIHead, CascadeRoIHead)
    ):
        return all(map(_is_known, head.children()))
    return type(head) is SingleRoIExtractor or predictors(head) is not None


def split(model: nn.Module) -> Tuple[List[nn.Module], List[nn.Module]]:
    """Split a model into what gets a fast form and what stays as it is.

    The heads of a detector read each other's outputs, so that one of which
    nothing is known leaves all as they are.

    Args:
        model (nn.Module): A detector, backbone or layer.

    Returns:
        tuple[list[nn.Module], list[nn.Module]]: Parts of the model, in the
        order in which they compute.

    Raises:
        ValueError: If the model holds whole detectors.
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


def _cast(value: Any, dtype: torch.dtype, **to: Any) -> Any:
    """Cast the tensors of numbers in nested lists and tuples."""
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(v, dtype, **to) for v in value)
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        return value
    return value.to(dtype, **(to if value.dim() == 4 else {}))


def _cast_input(
    module: nn.Module, args: tuple, kwargs: Dict[str, Any], **to: Any
) -> Tuple[tuple, Dict[str, Any]]:
    named = {name: _cast(value, **to) for name, value in kwargs.items()}
    return _cast(args, **to), named


def cast_before(module: nn.Module, **to: Any) -> None:
    """Cast what a module is called with, by position or by keyword.

    Args:
        module (nn.Module): The module; it gets a hook.
        **to: Arguments of ``Tensor.to``.
    """
    cast = partial(_cast_input, **to)
    module.register_forward_pre_hook(cast, with_kwargs=True)


def _cast_output(
    module: nn.Module, args: tuple, output: Any, **to: Any
) -> Any:
    return _cast(output, **to)


def cast_after(module: nn.Module, **to: Any) -> None:
    """Cast what a module returns.

    Args:
        module (nn.Module): The module; it gets a hook.
        **to: Arguments of ``Tensor.to``.
    """
    module.register_forward_hook(partial(_cast_output, **to))


def _in_float32(layer: nn.Module) -> nn.Module:
    """Let a predictor, or those inside, take inputs of any dtype."""
    if type(layer) is FusedConv2d:
        return Predictor(layer)
    if isinstance(layer, Scale) or hasattr(layer, 'weight'):
        cast_before(layer, dtype=torch.float32)
    for name, child in layer._modules.items():
        layer._modules[name] = _in_float32(child)
    return layer


def set_precision(
    module: nn.Module, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    """Let a module compute in a dtype and memory format, but for boxes,
    pooling and deformable layers: those compute as they can.

    Args:
        module (nn.Module): A part that has a fast form; it is changed.
        dtype (torch.dtype): float32, bfloat16, or float16 on CUDA.
        memory_format (torch.memory_format): Layout of weights and maps.
    """
    if stays(module):
        module.to(**PLAIN)
        cast_before(module, **PLAIN)
        cast_after(module, dtype=dtype, memory_format=memory_format)
        return
    # Others may compute from their weights as they lie, such as ConvWS2d.
    known = type(module) in (nn.Conv2d, nn.ConvTranspose2d)
    known = known or isinstance(module, Packed)
    layout = dict(memory_format=memory_format) if known else {}
    for tensor in (*module.parameters(False), *module.buffers(False)):
        tensor.data = _cast(tensor.data, dtype, **layout)
    names = predictors(module)
    for name, child in module.named_children():
        predicts = name in (names or ())
        child_dtype = torch.float32 if predicts else dtype
        set_precision(child, child_dtype, memory_format)
        if child_dtype != dtype:
            setattr(module, name, _in_float32(child))
    if names is not None and dtype != torch.float32:
        cast_after(module, dtype=torch.float32)
