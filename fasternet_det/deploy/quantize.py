"""INT8 forms of an ONNX graph, and which layers had better stay float32."""

import copy
from collections import defaultdict
from typing import Callable, Collection, Dict, Iterable, List, Tuple

import numpy as np
import onnx
from onnx.helper import make_empty_tensor_value_info, make_node
from onnxruntime import InferenceSession
from onnxruntime.quantization import (
    CalibrationMethod,
    QDQQuantizer,
    QuantType,
    TensorsData,
)
from onnxruntime.quantization.quant_utils import DEQUANT_OUTPUT_SUFFIX

# What becomes 8 bits wide: all that FasterNet has between convolutions.
QUANTIZED = ('Conv', 'Split', 'Concat', 'Add', 'Relu', 'Gelu', 'Resize')


def quantize(
    proto: onnx.ModelProto,
    images: Iterable[np.ndarray],
    accept: Callable[[onnx.ModelProto], bool] = lambda _: True,
) -> Tuple[onnx.ModelProto, List[str]]:
    """Quantise a graph to 8 bits, but for layers that stay in float32.

    None does if the whole is accepted. Else those do that add most noise, as
    few as bisection finds to be enough; each form on the way is judged.

    Args:
        proto (onnx.ModelProto): A graph of float32 with one input.
        images (Iterable[ndarray]): What it takes, to find the range of every
            tensor by.
        accept (Callable): Whether a quantised form is good enough. Defaults
            to any.

    Returns:
        tuple[onnx.ModelProto, list[str]]: The quantised form, and the names
        of what stays in float32: a convolution's weight, or a node. With
        nothing accepted, ``proto`` itself and all names.

    Raises:
        ValueError: If there is no image, or one is not finite, or overflows
            within the graph.
    """
    images = list(images)
    if not images:
        raise ValueError(
            'the calibration gives no image: expected some tens, and a new '
            'generator for each export'
        )
    # of some NaN, ONNX Runtime's minimum and maximum tell nothing
    if not all(np.isfinite(image).all() for image in images):
        raise ValueError('a calibration image is not finite')
    proto = onnx.shape_inference.infer_shapes(proto)
    names = _quantizable(proto.graph)
    ranges = _ranges(proto, names, images)
    best = _quantized(proto, ranges, names)
    if accept(best):
        return best, []
    layers = _layers(proto, ranges, names, images)
    ranked = list(layers)
    best, too_few, enough = proto, 0, len(ranked)
    while enough - too_few > 1:
        count = (too_few + enough) // 2
        rest = [name for layer in ranked[count:] for name in layers[layer]]
        form = _quantized(proto, ranges, rest)
        if accept(form):
            best, enough = form, count
        else:
            too_few = count
    return best, ranked[:enough]


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


def _quantized(
    proto: onnx.ModelProto,
    ranges: TensorsData,
    names: Collection[str],
    **options: bool,
) -> onnx.ModelProto:
    """Quantise some nodes, by the ranges of all tensors."""
    quantizer = QDQQuantizer(
        copy.deepcopy(proto),
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=ranges,
        nodes_to_quantize=names,
        nodes_to_exclude=[],
        op_types_to_quantize=QUANTIZED,
        extra_options=options,
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    return quantizer.model.model


def _run(
    proto: onnx.ModelProto, outputs: List[str], images: List[np.ndarray]
) -> List[List[np.ndarray]]:
    """Values of some tensors, by image."""
    del proto.graph.output[:]
    proto.graph.output.extend(map(make_empty_tensor_value_info, outputs))
    session = InferenceSession(
        proto.SerializeToString(), providers=['CPUExecutionProvider']
    )
    name = session.get_inputs()[0].name
    return [session.run(None, {name: image}) for image in images]


def _ranges(
    proto: onnx.ModelProto, names: Collection[str], images: List[np.ndarray]
) -> TensorsData:
    """Least and greatest value of each tensor that may be quantised, and 0.

    What follows regions of interest shall have the range of the regions of
    any level, and calibration may have some levels without any: the graph is
    run once for each level, with all regions taken from the next map.
    """
    graph = proto.graph
    floats = {
        value.name
        for value in (*graph.value_info, *graph.input)
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    }
    tensors = sorted(
        floats.intersection(
            tensor
            for node in graph.node
            if node.name in names
            for tensor in (*node.input, *node.output)
        )
    )
    probed, outputs = copy.deepcopy(proto), []
    for tensor in tensors:
        for kind in ('ReduceMin', 'ReduceMax'):
            outputs.append(f'{tensor}/{kind}')
            # `keepdims`: else an empty tensor is an error
            probed.graph.node.append(
                make_node(kind, [tensor], outputs[-1:], keepdims=1)
            )
    groups = _regions(probed.graph)
    low = high = np.zeros(len(tensors), np.float32)
    for _ in range(max(map(len, groups.values()), default=1)):
        for found in _run(probed, outputs, images):
            low = [np.min(a, initial=b) for a, b in zip(found[0::2], low)]
            high = [np.max(a, initial=b) for a, b in zip(found[1::2], high)]
        for group in groups.values():
            maps = [(node.input[0], node.attribute[:]) for node in group]
            for node, (source, attributes) in zip(group, maps[1:] + maps[:1]):
                node.input[0] = source
                del node.attribute[:]
                node.attribute.extend(attributes)
    if not np.isfinite([low, high]).all():
        raise ValueError(
            'from a calibration image the graph computes values that are not '
            'finite: are the weights?'
        )
    ranges = dict(zip(tensors, zip(low, high)))
    for output, group in groups.items():
        for node in group:
            if output in ranges:
                ranges[node.output[0]] = ranges[output]
    return TensorsData(CalibrationMethod.MinMax, ranges)


def _regions(graph: onnx.GraphProto) -> Dict[str, List[onnx.NodeProto]]:
    """The RoIAligns of all levels, by the tensor that they make together."""
    made = {
        node.output[0]: node
        for node in graph.node
        if node.op_type == 'RoiAlign'
    }
    return {
        node.output[0]: [made[tensor] for tensor in node.input]
        for node in graph.node
        if node.op_type == 'Concat' and node.input[0] in made
    }


def _layers(
    proto: onnx.ModelProto,
    ranges: TensorsData,
    names: Collection[str],
    images: List[np.ndarray],
) -> Dict[str, List[str]]:
    """Nodes by layer, from the layer that adds most noise to that of least.

    A layer is the convolutions of one weight, or another node. Its noise is
    what its 8 bits do to its output, in squares, relative to the output.
    """
    # A ReLU would vanish into the range of the convolution before it.
    graph = _quantized(
        proto,
        ranges,
        names,
        QDQKeepRemovableActivations=True,
        QuantizeBias=False,
    ).graph
    # Beside each node its twin of 8 bits, which reads the same float values
    both = copy.deepcopy(proto)
    known = {weight.name for weight in both.graph.initializer}
    both.graph.initializer.extend(
        weight for weight in graph.initializer if weight.name not in known
    )
    twins = {}
    for node in graph.node:
        if node.name in names:
            twins[node.name] = node.output[0]
            node.name += '/int8'
            node.output[:] = [f'{name}/int8' for name in node.output]
        elif node.op_type not in ('QuantizeLinear', 'DequantizeLinear'):
            continue
        both.graph.node.append(node)
    nodes = both.graph.node
    made = {name for node in nodes for name in node.output}
    squares = {}  # of an output, and of what 8 bits before and of it change
    for name, output in twins.items():
        tensors = [output]
        for other in {f'{output}/int8', output + DEQUANT_OUTPUT_SUFFIX} & made:
            tensors.append(f'{other}/change')
            nodes.append(make_node('Sub', [output, other], tensors[-1:]))
        squares[name] = [f'{tensor}/square' for tensor in tensors]
        nodes.extend(
            make_node('ReduceSumSquare', [tensor], [square], keepdims=0)
            for tensor, square in zip(tensors, squares[name])
        )
    outputs = sum(squares.values(), [])
    values = dict(zip(outputs, np.sum(_run(both, outputs, images), 0)))
    layers, noise = defaultdict(list), defaultdict(float)
    for node in proto.graph.node:
        if node.name in squares:
            layer = node.input[1] if node.op_type == 'Conv' else node.name
            signal, *changes = (values[name] for name in squares[node.name])
            layers[layer].append(node.name)
            noise[layer] = max(noise[layer], sum(changes) / (signal + 1e-12))
    ranked = sorted(layers, key=noise.get, reverse=True)
    return {layer: layers[layer] for layer in ranked}
