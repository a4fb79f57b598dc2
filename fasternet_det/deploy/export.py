"""Export to ONNX and OpenVINO, and running what was exported."""

import copy
import functools
import json
import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Callable, Dict, Iterable, List, Optional, Union

import numpy as np
import torch
import torch.nn as nn
from mmcv.ops import RoIAlign
from mmdet.models import BaseDetector, DetDataPreprocessor
from mmdet.models.necks import BFP
from mmengine.model import BaseModule
from torch import Tensor
from torch.nn.functional import pad

from ..data_preprocessor import MultiChannelDataPreprocessor
from ..layers import SAConv
from .decode import EndToEnd, nms, roi_align
from .fold import fold
from .fuse import stays
from .optimize import is_fast
from .versions import check_torch

try:
    import onnx
    import onnxruntime
    import openvino
    from onnxscript import opset18 as op

    from .quantize import quantize
except ImportError as error:
    raise ImportError(
        f'export needs {error.name}, which this environment lacks: run\n'
        "    pip install 'fasternet_det[deploy]'"
    ) from error

OLDEST_OPSET = 17
OPSET = 20  # the first in which GELU is one operator
ROI_ALIGN_OPSET = 21  # the last whose RoiAlign ONNX Runtime computes
NEWEST_OPSET = 25
INPUT = 'input'
DIMS = {0: 'batch', 2: 'height', 3: 'width'}

Session = Callable[[np.ndarray], List[np.ndarray]]


def _nms(
    boxes: Any, scores: Any, most: int, iou_thr: float, score_thr: float
) -> Any:
    return op.NonMaxSuppression(boxes, scores, most, iou_thr, score_thr)


def _roi_align(
    feature: Any,
    boxes: Any,
    images: Any,
    height: int,
    width: int,
    sampling_ratio: int,
    spatial_scale: float,
) -> Any:
    return op.RoiAlign(
        feature,
        boxes,
        images,
        output_height=height,
        output_width=width,
        sampling_ratio=sampling_ratio,
        spatial_scale=spatial_scale,
    )


TRANSLATIONS = {nms._opoverload: _nms, roi_align._opoverload: _roi_align}


class Pixels(nn.Module):
    """A graph with its normalisation and padding: from images as read.

    Args:
        graph (nn.Module): From normalised images to what it gives.
        preprocessor (DetDataPreprocessor): mmdet's, or ours for many
            channels.

    Raises:
        ValueError: If it is another.
    """

    def __init__(
        self, graph: nn.Module, preprocessor: DetDataPreprocessor
    ) -> None:
        super().__init__()
        if type(preprocessor) not in (
            DetDataPreprocessor,
            MultiChannelDataPreprocessor,
        ):
            raise ValueError(
                f'cannot export {type(preprocessor).__name__}: expected a '
                'DetDataPreprocessor, or a MultiChannelDataPreprocessor; '
                'export the graph of normalised images'
            )
        self.normalised = graph
        self.preprocessor = preprocessor

    def forward(self, images: Tensor) -> Any:
        """Normalise, pad and run the graph.

        Args:
            images (Tensor): Of shape (N, C, H, W), uint8; three channels as
                OpenCV reads them, BGR.

        Returns:
            What the graph gives.
        """
        # as mmengine's ImgDataPreprocessor does, which takes sides for numbers
        wanted = self.preprocessor
        images = images.float()
        if wanted._channel_conversion:
            images = images.flip(1)
        if wanted._enable_normalize:
            images = (images - wanted.mean) / wanted.std
        size = images.shape[2:]
        bottom, right = (-side % wanted.pad_size_divisor for side in size)
        images = pad(images, (0, right, 0, bottom), value=wanted.pad_value)
        if isinstance(self.normalised, EndToEnd):
            return self.normalised(images, size)
        return self.normalised(images)


def to_onnx(
    model: nn.Module,
    opset: int = OPSET,
    preprocessor: Optional[DetDataPreprocessor] = None,
) -> onnx.ModelProto:
    """Fold a model and express it in ONNX's standard operators.

    Args:
        model (nn.Module): A backbone or detector that :func:`fold` takes, in
            eval mode. It is left as it is.
        opset (int): Version of the operators, from 17 to 25, or, with
            RoIAlign, 21. Below 20, GELU is spelt out. Defaults to 20.
        preprocessor (DetDataPreprocessor, optional): What normalises the
            model's images; given that, the graph takes images as they are
            read, by :class:`Pixels`. Defaults to None.

    Returns:
        onnx.ModelProto: Its input, ``input``, takes normalised images of any
        shape (N, C, H, W) that the model takes, or uint8. Its outputs are the
        feature maps, ``map0`` and on, or the logits; of a detector, ``dets``,
        ``labels`` and, where it has them, ``masks``, as
        :class:`~fasternet_det.deploy.decode.EndToEnd` describes.

    Raises:
        RuntimeError: If torch is too old to export.
        ValueError: If the model cannot be folded or exported, or is in fast
            form, or the opset is out of range, or lacks what the model needs.
    """
    check_torch('export')
    if is_fast(model):
        raise ValueError('the model is in fast form: export the original')
    newest = NEWEST_OPSET
    if any(isinstance(module, RoIAlign) for module in model.modules()):
        newest = ROI_ALIGN_OPSET
    if not OLDEST_OPSET <= opset <= newest:
        raise ValueError(
            f'expected an opset from {OLDEST_OPSET} to {newest} for this '
            f'{type(model).__name__}, got {opset}'
        )
    folded = fold(model).cpu()
    for name, module in folded.named_modules():
        # BFP pools one level to the size of another.
        if isinstance(module, BFP) or (
            stays(module) and not isinstance(module, RoIAlign)
        ):
            advice = (
                'train it with use_deform=False'
                if isinstance(module, SAConv)
                else 'train a detector without, or export its backbone alone'
            )
            raise ValueError(
                f'cannot export {name}: ONNX has no operator for its '
                f'{type(module).__name__}; {advice}'
            )
    whole = isinstance(folded, BaseDetector)
    graph = EndToEnd(folded) if whole else folded
    # The first layer's: mmdet's backbones say none, or that of the last one.
    in_channels = next(
        module.in_channels
        for module in getattr(folded, 'backbone', folded).modules()
        if hasattr(module, 'in_channels')
        and not isinstance(module, BaseModule)
    )
    # torch takes a size of 1 in its example for a constant, and RetinaNet's
    # last level is at stride 128.
    images = torch.zeros(2, in_channels, 384, 512)
    pixels = preprocessor is not None
    program = torch.export.export(
        Pixels(graph, copy.deepcopy(preprocessor).cpu()) if pixels else graph,
        (images.byte() if pixels else images,),
        dynamic_shapes=({dim: torch.export.Dim.DYNAMIC for dim in DIMS},),
    )
    if whole:
        names = graph.names
    elif getattr(folded, 'fork_feat', True):
        count = len(program.graph_signature.user_outputs)
        names = [f'map{i}' for i in range(count)]
    else:
        names = ['logits']
    proto = torch.onnx.export(
        program,
        input_names=[INPUT],
        output_names=list(names),
        opset_version=max(opset, 18),  # torch knows none before
        custom_translation_table=TRANSLATIONS,
        verbose=False,
    ).model_proto
    if opset == 17:
        _lower(proto)
    return _tidy(proto)


def _lower(proto: onnx.ModelProto) -> None:
    """Bring opset 18 down to 17: the same operators, spelt otherwise."""
    constants = {weight.name: weight for weight in proto.graph.initializer}
    for node in proto.graph.node:
        schema = onnx.defs.get_schema(node.op_type, 17)
        if len(node.input) > schema.max_input:  # axes, then an attribute
            axes = onnx.numpy_helper.to_array(constants[node.input.pop()])
            node.attribute.append(onnx.helper.make_attribute('axes', axes))
        newer = onnx.defs.get_schema(node.op_type, 18).attributes
        for attribute in list(node.attribute):
            if attribute.name not in schema.attributes:
                default = newer[attribute.name].default_value
                if default.name and attribute != default:
                    raise ValueError(
                        f'opset 17 has no {attribute.name} of {node.op_type}, '
                        'which this model needs: export it at 18 or later'
                    )
                node.attribute.remove(attribute)
    proto.opset_import[0].version = 17


def _tidy(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Drop what the exporter notes of this machine, and name dimensions."""
    graph = proto.graph
    del graph.value_info[:]
    for thing in (graph, *graph.node, *graph.input, *graph.output):
        del thing.metadata_props[:]
        thing.doc_string = ''
    names = {
        graph.input[0].type.tensor_type.shape.dim[i].dim_param: name
        for i, name in DIMS.items()
    }
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = re.sub(
                    r'\w+', lambda m: names.get(m[0], m[0]), dim.dim_param
                )
    return proto


def export(
    model: nn.Module,
    path: Union[str, Path],
    metadata: Optional[Dict[str, Any]] = None,
    calibration: Optional[Iterable[np.ndarray]] = None,
    accept: Optional[Callable[[str], bool]] = None,
    opset: int = OPSET,
    preprocessor: Optional[DetDataPreprocessor] = None,
) -> List[str]:
    """Fold a model and write it to one ONNX file, or to OpenVINO's two.

    Args:
        model (nn.Module): See :func:`to_onnx`.
        path (str | Path): New file, ending in .onnx or .xml; beside an .xml,
            OpenVINO keeps the weights in a .bin.
        metadata (dict, optional): What a user of the file must know, as
            :func:`~fasternet_det.deploy.metadata.describe` tells it. Written
            as JSON by key: to ONNX's ``metadata_props``, or to OpenVINO's
            ``rt_info`` under ``model_info``. Defaults to None.
        calibration (Iterable[ndarray], optional): Images as the graph takes
            them, (N, C, H, W), to quantise it to INT8 by. Defaults to None,
            float32.
        accept (Callable, optional): Whether a quantised ONNX file, given its
            path, is good enough; else layers fall back to float32, see
            :func:`~fasternet_det.deploy.quantize.quantize`. Defaults to any.
        opset (int): See :func:`to_onnx`.
        preprocessor (DetDataPreprocessor, optional): See :func:`to_onnx`.

    Returns:
        list[str]: What stays in float32 for the sake of ``accept``.

    Raises:
        FileExistsError: If there is such a file.
        FileNotFoundError: If its folder is missing.
        ValueError: If the path ends otherwise, or the model cannot be folded
            or exported.
    """
    path = Path(path)
    check_target(path)
    proto, kept = to_onnx(model, opset, preprocessor), []
    notes = {k: json.dumps(v) for k, v in (metadata or {}).items()}
    # What fails leaves nothing half-written.
    with TemporaryDirectory(dir=path.parent) as folder:
        source = str(Path(folder, f'{path.stem}.onnx'))

        def judge(form: onnx.ModelProto) -> bool:
            onnx.save(form, source)
            return accept is None or accept(source)

        if calibration is not None:
            proto, kept = quantize(proto, calibration, judge)
        onnx.helper.set_model_props(proto, notes)
        onnx.save(proto, source)
        onnx.checker.check_model(source, full_check=True)
        if path.suffix == '.xml':
            converted = openvino.convert_model(source)
            for key, value in notes.items():
                converted.set_rt_info(value, ['model_info', key])
            target = Path(folder, path.name)
            openvino.save_model(converted, target, compress_to_fp16=False)
            os.replace(target.with_suffix('.bin'), path.with_suffix('.bin'))
            os.replace(target, path)
        else:
            os.replace(source, path)
    return kept


def check_target(path: Path) -> None:
    """Refuse a file that cannot be exported to.

    Args:
        path (Path): See :func:`export`.

    Raises:
        FileExistsError: If there is such a file.
        FileNotFoundError: If its folder is missing.
        ValueError: If it ends otherwise.
    """
    if path.suffix not in ('.onnx', '.xml'):
        raise ValueError(f'{path} ends in neither .onnx nor .xml (OpenVINO)')
    if not path.parent.is_dir():
        raise FileNotFoundError(f'there is no folder {path.parent}')
    files = [path] + [path.with_suffix('.bin')] * (path.suffix == '.xml')
    for file in files:
        if file.exists():
            raise FileExistsError(f'{file} exists: remove it or name another')


@functools.lru_cache(maxsize=None)
def _openvino() -> openvino.Core:
    """The one core of the process, which is never released.

    Each sets up a stack for signals, and gives back on its release the one
    that it found: of two, released in the order in which they were made, that
    of the first, which is gone. The next signal with a handler, such as that
    of a worker of torch's DataLoader that ends, then kills the process.
    """
    return openvino.Core()


def load(
    path: Union[str, Path],
    runtime: str = 'onnxruntime',
    threads: int = 0,
    precision: str = 'f32',
) -> Session:
    """Load what was exported, to run it on the CPU.

    Args:
        path (str | Path): An .onnx file, or, for OpenVINO, an .xml too.
        runtime (str): 'onnxruntime' or 'openvino'. Defaults to
            'onnxruntime'.
        threads (int): Most threads to use; 0 lets the runtime choose.
            Defaults to 0.
        precision (str): 'f32', or, for OpenVINO, 'bf16'. Defaults to 'f32'.

    Returns:
        Callable: Takes images (N, C, H, W); returns the outputs in
        their order.

    Raises:
        ValueError: If the runtime, or its precision, is unknown.
    """
    if runtime == 'onnxruntime' and precision == 'f32':
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(
            str(path), options, providers=['CPUExecutionProvider']
        )
        return lambda images: session.run(None, {INPUT: images})
    if runtime == 'openvino' and precision in ('f32', 'bf16'):
        compiled = _openvino().compile_model(
            str(path),
            'CPU',
            dict(
                INFERENCE_NUM_THREADS=threads,
                INFERENCE_PRECISION_HINT=precision,
                PERFORMANCE_HINT='LATENCY',
            ),
        )
        return lambda images: list(compiled(images).values())
    raise ValueError(
        f'expected onnxruntime in f32 or openvino in f32 or bf16, got '
        f'{runtime} in {precision}'
    )
