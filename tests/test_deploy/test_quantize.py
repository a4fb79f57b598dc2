"""INT8 of graphs made by hand; that of detectors is in test_export.py."""

import numpy as np
import onnx
import pytest
from fill import fill_array, fill_input
from onnx.numpy_helper import from_array, to_array
from onnxruntime import InferenceSession

from fasternet_det.deploy.quantize import quantize

# Masks of two small regions of one map, and, of a large image, of the whole:
# a region of another map.
REGIONS = """
<ir_version: 10, opset_import: ["" : 20]>
regions (float[1, 3, H, W] input) => (float[R, 1, 4, 4] masks)
<float[2, 4] small_boxes = {2, 3, 21, 17, 9, 8, 30, 28},
 float[2] corner = {0, 0}, int64[1] first = {0}, int64[2] images = {0, 0},
 float[1] least = {100}>
{
  small_map = Conv <strides = [4, 4]> (input, small_weight)
  large_map = Conv <strides = [16, 16]> (input, large_weight)
  shape = Shape <start = 2> (input)
  sides = Cast <to = 1> (shape)
  height = Gather (sides, first)
  flat_box = Concat <axis = 0> (corner, sides)
  box = Unsqueeze (flat_box, first)
  is_large = Greater (height, least)
  large_boxes = Compress <axis = 0> (box, is_large)
  image = Compress <axis = 0> (first, is_large)
  small = RoiAlign <output_height = 4, output_width = 4, spatial_scale = 0.25>
    (small_map, small_boxes, images)
  large = RoiAlign
    <output_height = 4, output_width = 4, spatial_scale = 0.0625>
    (large_map, large_boxes, image)
  both = Concat <axis = 0> (small, large)
  mixed = Conv <pads = [1, 1, 1, 1]> (both, mix_weight)
  masks = Conv (mixed, last_weight)
}
"""
# A residual block before a last layer.
BLOCK = """
<ir_version: 10, opset_import: ["" : 20]>
block (float[1, 3, H, W] input) => (float[1, 1, H, W] map)
{
  stem = Conv (input, stem_weight)
  wide = Conv (stem, wide_weight)
  act = Relu (wide)
  back = Conv (act, back_weight)
  sum = Add (stem, back)
  map = Conv (sum, last_weight)
}
"""


def graph(text, **shapes):
    """A graph of a text, with reference weights of given shapes."""
    proto = onnx.parser.parse_model(text)
    for node in proto.graph.node:
        node.name = f'node_{node.output[0]}'
    for name, shape in shapes.items():
        weight = np.asarray(fill_array(f'{name}.weight', shape))
        proto.graph.initializer.append(from_array(weight, f'{name}_weight'))
    return proto


def residual_block():
    return graph(
        BLOCK,
        stem=(8, 3, 1, 1),
        wide=(16, 8, 1, 1),
        back=(8, 16, 1, 1),
        last=(1, 8, 1, 1),
    )


def scale(proto, name, factors):
    """Multiply a weight, channel by channel perhaps."""
    (weight,) = (w for w in proto.graph.initializer if w.name == name)
    values = (to_array(weight) * np.float32(factors)).astype(np.float32)
    weight.CopyFrom(from_array(values, name))


def images_of(side):
    return [fill_input(i, (1, 3, side, side)) for i in range(3)]


def run(proto, image):
    session = InferenceSession(proto.SerializeToString())
    (output,) = session.run(None, {'input': image})
    return output


def error(quantized, proto, image):
    """The largest of each of the first axis, relative to the values."""
    expected = run(proto, image)
    wrong = np.abs(run(quantized, image) - expected)
    return wrong.max((1, 2, 3)) / np.abs(expected).max((1, 2, 3))


def test_images_that_tell_no_range():
    proto = residual_block()
    images = iter(images_of(8))
    assert quantize(proto, images)[1] == []
    with pytest.raises(ValueError, match='gives no image: .* new generator'):
        quantize(proto, images)  # at its end
    broken = images_of(8)
    broken[1][0, 1, 2, 3] = np.nan
    with pytest.raises(ValueError, match='a calibration image is not finite'):
        quantize(proto, broken)
    scale(proto, 'wide_weight', np.inf)
    with pytest.raises(ValueError, match='not finite: are the weights'):
        quantize(proto, images_of(8))


def test_regions_of_a_level_that_calibration_lacks():
    """Their values are eight times as large as those that it has seen."""
    proto = graph(
        REGIONS,
        small=(8, 3, 4, 4),
        large=(8, 3, 16, 16),
        mix=(8, 8, 3, 3),
        last=(1, 8, 1, 1),
    )
    scale(proto, 'large_weight', 8)
    image = fill_input(3, (1, 3, 128, 128))
    quantized, kept = quantize(proto, images_of(64))
    assert kept == []
    assert len(run(proto, images_of(64)[0])) == 2
    errors = error(quantized, proto, image)
    assert errors.shape == (3,)
    assert 0 < errors[2] < 0.05
    # without the large values, the small ones would be more exact
    assert errors.max() < 0.2


@pytest.fixture
def block():
    """In it, the ReLU has one channel of huge values, which nothing reads."""
    proto = residual_block()
    huge, unread = np.ones(16), np.ones(16)
    huge[3], unread[3] = 1000, 0
    scale(proto, 'wide_weight', huge.reshape(-1, 1, 1, 1))
    scale(proto, 'back_weight', unread.reshape(-1, 1, 1))
    return proto


@pytest.mark.parametrize(
    'most, kept',
    [
        (1.0, []),
        # what reads the channel and what writes it, worst first
        (0.1, ['back_weight', 'wide_weight']),
        # and all that comes before the last layer
        (0.0, ['back_weight', 'wide_weight', 'node_sum', 'stem_weight']),
    ],
)
def test_layers_fall_back(most, kept, block):
    image = images_of(16)[0]
    errors = []

    def accept(form):
        errors.append(error(form, block, image)[0])
        return errors[-1] <= most

    quantized, found = quantize(block, images_of(16), accept)
    assert errors[0] > 0.3  # of the whole
    assert found == kept
    assert error(quantized, block, image) <= most
    assert len(errors) <= 4
    floats = {
        weight.name
        for weight in quantized.graph.initializer
        if weight.data_type == onnx.TensorProto.FLOAT
    }
    weights = {name for name in kept if name.endswith('_weight')}
    assert {n for n in floats if n.endswith('_weight')} == weights | {
        'last_weight'
    }


def test_nothing_is_accepted(block):
    quantized, kept = quantize(block, images_of(16), lambda form: False)
    assert len(kept) == 5  # the ReLU too
    assert error(quantized, block, images_of(16)[0]) == 0
    kinds = {node.op_type for node in quantized.graph.node}
    assert kinds == {'Conv', 'Relu', 'Add'}
