"""The fast form of a backbone, or of a detector."""

from typing import Any, Dict, Iterable, Optional

import torch
import torch.nn as nn
from mmdet.models import BaseDetector
from mmdet.models.necks import FPN
from torch import Tensor

from ..backbones import FasterNet
from . import int8
from .fold import fold
from .fuse import fuse
from .operators import FusedConv2d, kernel_dtypes
from .precision import (
    PLAIN,
    cast_after,
    cast_before,
    predictors,
    set_precision,
    split,
)
from .versions import check_torch


def is_fast(model: nn.Module) -> bool:
    """Whether a model is what :func:`optimize` has made.

    Args:
        model (nn.Module): Any.
    """
    return any(
        _refuse_gradients in module._forward_pre_hooks.values()
        for module in model.modules()
    )


def _check(model: nn.Module, dtype: torch.dtype) -> None:
    """Refuse what cannot be computed in a dtype."""
    if is_fast(model):
        raise ValueError(
            'the model is in fast form already: optimise the original'
        )
    weight = next(model.parameters(), None)
    if weight is None:
        raise ValueError(f'a {type(model).__name__} has no weights')
    device = weight.device.type
    dtypes = [torch.float32, torch.bfloat16]
    dtypes += dict(cuda=[torch.float16], cpu=[torch.int8]).get(device, [])
    if dtype not in dtypes:
        raise ValueError(
            f'cannot compute in {dtype!r} on {device}, expected one of '
            f'{", ".join(map(str, dtypes))}'
        )
    if (
        device == 'cpu'
        and dtype == torch.bfloat16
        and dtype not in kernel_dtypes()
    ):
        raise ValueError(
            'cannot compute in torch.bfloat16 on this CPU: it needs '
            'avx512_bf16 or amx_bf16, see `lscpu`, and a torch with oneDNN; '
            'use torch.float32'
        )
    if dtype == torch.int8 and dtype not in kernel_dtypes():
        raise ValueError(
            'cannot compute in torch.int8: it needs a torch with oneDNN, and '
            'its torch.ops.onednn; use torch.float32'
        )


def _compile(part: nn.Module) -> None:
    """Compile necks and the forwards of heads.

    Between those and the detections, sizes depend on values.
    """
    for module in part.modules():
        if isinstance(module, FPN) or predictors(module) is not None:
            module.compile()


def _refuse_gradients(
    module: nn.Module, args: tuple, kwargs: Dict[str, Any]
) -> None:
    if torch.is_grad_enabled() and any(
        isinstance(value, Tensor) and value.requires_grad
        for value in (*args, *kwargs.values())
    ):
        raise RuntimeError(
            'the fast form computes in place and gives no gradients: call it '
            'under torch.no_grad(), or differentiate the model that fold() '
            'gives'
        )


@torch.no_grad()
def optimize(
    model: nn.Module,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.channels_last,
    compile: bool = False,
    winograd: bool = True,
    calibration: Optional[Iterable[Any]] = None,
) -> nn.Module:
    """Make the fast form of a detector, or of a backbone.

    BatchNorms are folded (:func:`fold`), weights laid out for the processor,
    activations and residuals fused into the convolutions, partial
    convolutions computed in place: a forward hook on a block sees a map that
    the next block overwrites. The result has the interface of the model:
    ``DetInferencer``, ``inference_detector`` and mmdet's test loop run it
    unchanged.

    What has no fast form, such as deformable convolutions and the heads that
    :mod:`~fasternet_det.deploy.precision` does not list, computes as it does
    in the model, in float32.

    Args:
        model (nn.Module): A layer, backbone or mmdet detector in eval mode. It
            is left as it is.
        dtype (torch.dtype): In which to compute: float32 (outputs equal the
            model's to 1e-5 relative), bfloat16, float16 on CUDA, or on CPUs
            int8 (:mod:`~fasternet_det.deploy.int8`; what it does not suit is
            computed in bfloat16 if the CPU can, else in float32). Boxes are
            predicted, decoded, suppressed and pooled from in float32 anyway.
            Defaults to float32.
        memory_format (torch.memory_format): Layout of weights and image.
            oneDNN, on CPUs, gives maps in channels_last from either.
            Defaults to ``torch.channels_last``.
        compile (bool): Whether to leave the fusing to ``torch.compile``, which
            takes minutes at the first call. Defaults to False.
        winograd (bool): Whether 3x3 convolutions in float32 may be computed by
            :mod:`~fasternet_det.deploy.winograd`, where that is faster.
            Defaults to True.
        calibration (Iterable, optional): With int8, some tens of images to
            find by what the maps span: for a detector, batches such as its
            ``test_step`` takes and a dataloader gives; for other modules,
            tensors (N, C, H, W). Defaults to None.

    Returns:
        nn.Module: A copy for inference, without gradients. A bare backbone's
        maps are of ``dtype``.

    Raises:
        RuntimeError: If torch is older than 2.6.
        ValueError: If the model trains, is in fast form already, has no
            weights, holds whole detectors, or cannot be computed in
            ``dtype``.
    """
    check_torch('optimize')
    from .decode import decode_heads  # cannot be imported on an older one

    _check(model, dtype)
    batches = None
    if dtype == torch.int8 and not compile and calibration is not None:
        batches = int8.check(model, calibration)
        low = torch.bfloat16 in kernel_dtypes()
        dtype = torch.bfloat16 if low else torch.float32
    elif dtype == torch.int8 or calibration is not None:
        raise ValueError(
            'torch.int8 goes with calibration, some tens of images, and '
            'without compile; other dtypes without calibration'
        )
    model = fold(model)
    fast, plain = split(model)
    if compile:
        fast[0].compile()  # the backbone
        for part in fast:
            _compile(part)
    else:
        known: Dict[nn.Module, nn.Module] = {}
        fast = [fuse(part, known) for part in fast]
        if isinstance(model, BaseDetector):
            for name, child in model.named_children():
                setattr(model, name, known.get(child, child))
        else:
            (model,) = fast
    for part in fast:
        set_precision(part, dtype, memory_format)
    for part in plain:
        part.to(**PLAIN)
    for module in model.modules():
        if isinstance(module, FusedConv2d):
            module.winograd = winograd
    if not plain:
        decode_heads(model)
    fast[0].register_forward_pre_hook(_refuse_gradients, with_kwargs=True)
    # A bare block would compute in its caller's memory.
    copy = not isinstance(model, (BaseDetector, FasterNet))
    cast_before(fast[0], dtype=dtype, memory_format=memory_format, copy=copy)
    if plain:
        cast_after(fast[-1], **PLAIN)
    if batches is not None:
        int8.quantize(model, fast[-1], batches)
    return model.requires_grad_(False)
