"""Export to ONNX and OpenVINO, and running what was exported."""

import json
import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Callable, Dict, Iterable, List, Optional, Union

import numpy as np
import torch
import torch.nn as nn
from mmdet.models import BaseDetector

from ..layers import SAConv
from .decode import EndToEnd, nms, roi_align
from .fold import fold
from .versions import check_torch

try:
    import onnx
    import onnxruntime
    import openvino
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantType,
        quantize_static,
    )
    from onnxscript import opset20 as op
except ImportError as error:
    raise ImportError(
        f'export needs {error.name}, which this environment lacks: run\n'
        "    pip install 'fasternet_det[deploy]'"
    ) from error

OPSET = 20  # the first in which GELU is one operator
INPUT = 'input'
# What becomes 8 bits wide: all that FasterNet has between convolutions.
QUANTIZED = ['Conv', 'Split', 'Concat', 'Add', 'Relu', 'Gelu', 'Resize']
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


def to_onnx(model: nn.Module) -> onnx.ModelProto:
    """Fold a model and express it in ONNX's standard operators.

    Args:
        model (nn.Module): A backbone or detector that :func:`fold` takes, in
            eval mode and not folded. It is left as it is.

    Returns:
        onnx.ModelProto: Its input, ``input``, takes normalised images of any
        shape (N, C, H, W) that the model takes. Its outputs are the feature
        maps, ``map0`` and on, or the logits; of a detector, ``dets``,
        ``labels`` and, where it has them, ``masks``, as
        :class:`~fasternet_det.deploy.decode.EndToEnd` describes.

    Raises:
        RuntimeError: If torch is too old to export.
        ValueError: If the model cannot be folded or exported.
    """
    check_torch('export')
    folded = fold(model)
    for name, module in folded.named_modules():
        if isinstance(module, SAConv):  # which else is folded away
            raise ValueError(
                f'cannot export {name}: its SAConv is deformable, and ONNX '
                'has no such operator; train it with use_deform=False'
            )
    whole = isinstance(folded, BaseDetector)
    graph = EndToEnd(folded) if whole else folded
    # The first that says so: mmdet's own backbones do not, their stem does.
    in_channels = next(
        module.in_channels
        for module in getattr(folded, 'backbone', folded).modules()
        if hasattr(module, 'in_channels')
    )
    # torch takes a size of 1 in its example for a constant, and RetinaNet's
    # last level is at stride 128.
    program = torch.export.export(
        graph,
        (torch.zeros(2, in_channels, 384, 512),),
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
        opset_version=OPSET,
        custom_translation_table=TRANSLATIONS,
        verbose=False,
    ).model_proto
    return _tidy(proto)


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


class _Images(CalibrationDataReader):
    """Calibration images, one after another."""

    def __init__(self, images: Iterable[np.ndarray]) -> None:
        self.images = iter(images)

    def get_next(self) -> Optional[Dict[str, np.ndarray]]:
        image = next(self.images, None)
        return None if image is None else {INPUT: image}


def _quantizable(graph: onnx.GraphProto) -> List[str]:
    """Names of the nodes before the last convolutions.

    Those give scores and deltas. They stay float32, and so does decoding: it
    costs little, and AP hangs on it.
    """
    names, read = [], set()  # `read`: by a convolution, at once or later
    for node in reversed(graph.node):
        leads = not read.isdisjoint(node.output)
        if leads and node.op_type in QUANTIZED:
            names.append(node.name)
        convolves = node.op_type in ('Conv', 'ConvTranspose')
        if convolves or (leads and node.op_type != 'RoiAlign'):
            # what is gathered, not where: that is of boxes
            first_only = node.op_type.startswith('Gather')
            read.update(node.input[:1] if first_only else node.input)
    return names


def _quantize(path: str, images: Iterable[np.ndarray]) -> None:
    """Quantise an ONNX file to 8 bits, in place."""
    quantize_static(
        path,
        path,
        _Images(images),
        op_types_to_quantize=QUANTIZED,
        nodes_to_quantize=_quantizable(onnx.load(path).graph),
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
    )


def export(
    model: nn.Module,
    path: Union[str, Path],
    metadata: Optional[Dict[str, Any]] = None,
    calibration: Optional[Iterable[np.ndarray]] = None,
) -> None:
    """Fold a model and write it to one ONNX file, or to OpenVINO's two.

    Args:
        model (nn.Module): See :func:`to_onnx`.
        path (str | Path): New file, ending in .onnx or .xml; beside an .xml,
            OpenVINO keeps the weights in a .bin.
        metadata (dict, optional): What a user of the file must know, such as
            the mean and std of images. Written as JSON by key: to ONNX's
            ``metadata_props``, or to OpenVINO's ``rt_info`` under
            ``model_info``. Defaults to None.
        calibration (Iterable[ndarray], optional): Normalised images
            (N, C, H, W) to quantise the model to INT8 by. Defaults to None,
            float32.

    Raises:
        FileExistsError: If there is such a file.
        FileNotFoundError: If its folder is missing.
        ValueError: If the path ends otherwise, or the model cannot be folded
            or exported.
    """
    path = Path(path)
    check_target(path)
    proto = to_onnx(model)
    notes = {k: json.dumps(v) for k, v in (metadata or {}).items()}
    # What fails leaves nothing half-written.
    with TemporaryDirectory(dir=path.parent) as folder:
        source = str(Path(folder, f'{path.stem}.onnx'))
        onnx.save(proto, source)
        if calibration is not None:
            _quantize(source, calibration)
            proto = onnx.load(source)
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
        Callable: Takes images (N, C, H, W), float32; returns the outputs in
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
        compiled = openvino.Core().compile_model(
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
