"""The fast form in 8 bits, quantised after training; nothing is exported.

A layer that oneDNN computes in 8 bits gives a :class:`ByteMap`: bytes on a
known scale, which the next such layer reads as they are, and all else as
floats. What has readers of bytes, and which scale suits it, is found by
running the model on some images.

torchao's PT2E quantiser makes graphs of the same operators, but only of what
``torch.export`` captures whole, which a detector is not; and torch.compile
takes minutes, and a C++ compiler, to make one fast, for one image size.
"""

import logging
import math
from collections.abc import Mapping
from functools import lru_cache
from itertools import islice
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

import torch
import torch.nn as nn
from mmdet.models import BaseDetector
from mmengine.logging import print_log
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .fuse import Builder, fuse
from .operators import (
    FusedConv2d,
    FusedLinear,
    FusedUpsample,
    InPlaceBlock,
    Packed,
    interleave,
)
from .precision import predictors

# A layer stays as it is if 8 bits change more than this share of its output,
# as roots of the means of squares.
MOST_NOISE = 0.1
MOST_BATCHES = 256  # to calibrate on
# With fewer channels, an image's, there is little to win.
LEAST_CHANNELS = 8
# Values that are converted at a time, so that they stay in cache.
CHUNK = 2**18
# The last bit of a float32 of this size is 1: its lowest byte counts.
COUNTS = 2.0**23
# Values of each map by which a scale is chosen, and how much of the least and
# of the greatest it may span.
SAMPLES = 2**12
SHARES = torch.linspace(0.3, 1, 15)
aten, onednn = torch.ops.aten, torch.ops.onednn
GEOMETRY_1X1 = ([1, 1], [0, 0], [1, 1])


class Scale(NamedTuple):
    """What bytes stand for: ``step * (byte - zero)``."""

    step: float
    zero: int
    sum: Optional['Scale'] = None  # when another map is added


# ---- bytes


def _convert(x: Tensor, dtype: torch.dtype, convert: Callable) -> Tensor:
    """Convert a map (N, C, H, W), then in channels_last, or a matrix."""
    is_map = x.dim() == 4
    x = (x.permute(0, 2, 3, 1) if is_map else x).contiguous()
    out = torch.empty(x.shape, dtype=dtype)
    for part, into in zip(x.view(-1).split(CHUNK), out.view(-1).split(CHUNK)):
        convert(part, into)
    return out.permute(0, 3, 1, 2) if is_map else out


def to_bytes(x: Tensor, scale: Scale) -> Tensor:
    """Round floats to bytes; what is outside gets the least or greatest."""

    def convert(part: Tensor, into: Tensor) -> None:
        part = part.float() * (1 / scale.step)
        part.add_(COUNTS + scale.zero).clamp_(COUNTS, COUNTS + 255)
        into.copy_(part.view(torch.int32))

    return _convert(x, torch.uint8, convert)


def to_floats(x: Tensor, scale: Scale, dtype: torch.dtype) -> Tensor:
    """Give the values of bytes."""

    def convert(part: Tensor, into: Tensor) -> None:
        into.copy_(part.float().sub_(scale.zero).mul_(scale.step))

    return _convert(x, dtype, convert)


@lru_cache(maxsize=None)
def _identity(channels: int) -> Tuple[Tensor, Tensor, Tensor]:
    """Weight, its steps and zeros of a convolution that changes nothing."""
    weight = torch.full((channels, 1, 1, 1), 64, dtype=torch.int8)
    steps = torch.full((channels,), 1 / 64)
    packed = onednn.qconv_prepack(
        weight, steps, 1.0, 1, *GEOMETRY_1X1, channels
    )
    return packed, steps, torch.zeros(channels, dtype=torch.int32)


# ---- maps that some operators know, and all others read as floats


class _Map(Tensor):
    """A map, held in some form.

    Args:
        held (Tensor): The form.
        dtype (torch.dtype): Of the floats that other operators read.
        key (Range | Scale | None): What is known of it; None if nothing is,
            and ``held`` are the floats.
        is_rectified (bool): Whether a ReLU gave it. Defaults to False.
    """

    @staticmethod
    def __new__(  # noqa: D102
        cls: type, held: Tensor, dtype: torch.dtype, *_: Any
    ) -> '_Map':
        return Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=dtype
        )

    def __init__(
        self,
        held: Tensor,
        dtype: torch.dtype,
        key: Any,
        is_rectified: bool = False,
    ) -> None:
        self.held = held
        self.key = key
        self.is_rectified = is_rectified

    @classmethod
    def __torch_dispatch__(  # noqa: D105
        cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        x = args[0] if args and isinstance(args[0], cls) else None
        out, name = None, KNOWN.get(func.overloadpacket)
        if name and x is not None and x.key is not None and not kwargs:
            out = getattr(x, name)(func, *args[1:])
        is_in_place = x is not None and func._schema.is_mutable
        if out is None:
            if x is not None and func.is_view:
                x.forget()
            args, kwargs = as_floats((args, kwargs or {}))
            out = func(*args, **kwargs)
            if is_in_place:
                out = cls(out, x.dtype, None)
        if is_in_place:
            x.__dict__.clear()
            x.__dict__.update(out.__dict__)
            return x
        return out


KNOWN = {
    aten.relu: 'rectified',
    aten.relu_: 'rectified',
    aten.add: 'added',
    aten.add_: 'added',
    aten.upsample_nearest2d: 'enlarged',
}


def as_floats(value: Any) -> Any:
    """Give the floats of all maps, also in nested lists and tuples."""
    return tree_map_only(_Map, lambda x: x.floats(), value)


class ByteMap(_Map):
    """A map of bytes on a :class:`Scale`."""

    def forget(self) -> None:
        """Keep the floats alone: somebody may write to a view of them."""
        self.held, self.key = self.floats(), None

    def floats(self) -> Tensor:
        """The map as a plain tensor, kept for other readers."""
        if self.key is None:
            return self.held
        if not hasattr(self, 'kept'):
            self.kept = to_floats(self.held, self.key, self.dtype)
        return self.kept

    def rectified(self, func: Callable) -> 'ByteMap':  # noqa: D102
        held, zero = self.held, self.key.zero
        return ByteMap(
            held.clamp(min=zero) if zero else held, self.dtype, self.key
        )

    def added(self, func: Callable, other: Any) -> Optional['ByteMap']:
        """By a convolution that adds: torch's own sum of bytes is slow."""
        to = self.key.sum
        if not (to and isinstance(other, ByteMap) and other.key):
            return None
        if other.shape != self.shape or self.dim() != 4:
            return None
        channels = self.shape[1]
        into = other.held.clone(memory_format=torch.channels_last)
        held = onednn.qconv2d_pointwise.binary(
            *(self.held, *self.key[:2], *_identity(channels)),
            *(into, None, *GEOMETRY_1X1, channels),
            *(*to[:2], torch.uint8, *other.key[:2]),
            *('sum', 1.0, 'none', [], ''),
        )
        return ByteMap(held, self.dtype, to)

    def enlarged(self, func: Callable, *args: Any) -> 'ByteMap':  # noqa: D102
        return ByteMap(func(self.held, *args), self.dtype, self.key)


class Range:
    """What the values of maps span, and who reads these.

    Args:
        is_signed (bool): Whether more than ReLUs read it. Defaults to False,
            until something does.
    """

    def __init__(self, is_signed: bool = False) -> None:
        self.is_signed = is_signed
        self.low = self.high = 0.0
        self.samples: List[Tensor] = []
        self.generator = torch.Generator().manual_seed(0)
        self.readers: set = set()
        self.sum: Optional[Range] = None

    def observe(self, x: Tensor) -> None:
        """Widen it to the values of a tensor."""
        if not x.numel():
            return
        low, high = (bound.item() for bound in x.aminmax())
        if not math.isfinite(high - low):
            raise ValueError(
                'calibration gives values that are not finite: expected '
                'images such as the model is tested with'
            )
        self.low, self.high = min(self.low, low), max(self.high, high)
        values = x.permute(0, 2, 3, 1) if x.dim() == 4 else x  # as they lie
        index = torch.randint(x.numel(), (SAMPLES,), generator=self.generator)
        self.samples.append(values.flatten()[index].float())

    def in_bytes(self) -> bool:
        """Whether it was seen, and one of the readers reads bytes."""
        readers = self.readers if self.samples else ()
        return any(reader.in_bytes() for reader in readers if reader)

    def scale(self) -> Scale:
        """The scale that changes its values least, in squares."""
        values = torch.cat(self.samples)
        lows = SHARES * (self.low if self.is_signed else 0.0)
        highs = SHARES * self.high
        values = values.clamp(min=lows[-1].item())
        steps = (highs[:, None] - lows) / 255
        # By rounding, but for zeros, and by what is cut off.
        lost = steps.square() / 12 * values.count_nonzero()
        lost += (values - highs[:, None]).relu_().square_().sum(1)[:, None]
        lost += (lows[:, None] - values).relu_().square_().sum(1)
        best = lost.argmin().item()
        step = steps.flatten()[best].item() or 1.0
        low = lows[best % len(lows)].item()
        has_sum = self.sum is not None and self.sum.in_bytes()
        return Scale(
            step, round(-low / step), self.sum.scale() if has_sum else None
        )


class Observed(_Map):
    """A map of floats of a :class:`Range`, whose readers it notes."""

    def read(self, reader: Any) -> Tensor:
        """The map as a plain tensor, for what reads bytes, or None."""
        if self.key is not None:
            self.key.readers.add(reader)
            self.key.is_signed |= not self.is_rectified
        return self.held

    def forget(self) -> None:
        """It holds the floats that a view is of."""

    def floats(self) -> Tensor:
        """The map as a plain tensor."""
        return self.read(None)

    def rectified(self, func: Callable) -> 'Observed':  # noqa: D102
        return Observed(func(self.held), self.dtype, self.key, True)

    def added(self, func: Callable, other: Any) -> Optional['Observed']:
        """Into a range of its own."""
        if not isinstance(other, Observed) or other.shape != self.shape:
            return None
        key = self.key.sum or Range()
        if other.key is key:  # of layers that are run again
            return None
        self.key.sum = key
        out = func(self.read(key), other.read(key))
        key.observe(out)
        return Observed(out, self.dtype, key)

    def enlarged(self, func: Callable, *args: Any) -> 'Observed':  # noqa: D102
        out = func(self.held, *args)
        return Observed(out, self.dtype, self.key, self.is_rectified)


# ---- layers


@lru_cache(maxsize=None)
def most_weight() -> int:
    """The greatest weight with which this CPU's sums do not saturate.

    Without VNNI, products of a byte and a weight are added in pairs, in 16
    bits. oneDNN, "Nuances of int8 Computations".
    """
    x = torch.full((1, 64, 8, 8), 255, dtype=torch.uint8)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.full((64, 64, 3, 3), 127, dtype=torch.int8)
    steps, zeros = torch.ones(64), torch.zeros(64, dtype=torch.int32)
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    packed = onednn.qconv_prepack(weight, steps, 1.0, 0, *geometry)
    out = onednn.qconv2d_pointwise(
        *(x, 1.0, 0, packed, steps, zeros, None, *geometry),
        *(1.0, 0, torch.float32, 'none', [], ''),
    )
    return 127 if out.max() == 255 * 127 * 64 * 9 else 63


class Int8Layer(Packed):
    """A convolution or linear layer of 8 bits.

    It reads a :class:`ByteMap`, floats, or plain bytes; to these it answers
    in plain bytes.

    Args:
        layer (FusedConv2d | FusedLinear): The layer.
        read (Scale): Of the floats or plain bytes that it reads.
        given (Scale): Of what it gives; None to give floats.
        added (Scale, optional): Of the map to which it adds. Defaults to
            None.
        factor (Tensor, optional): Of what it reads, by channel: (C_in, 1, 1).
            Defaults to None.
    """

    def __init__(
        self,
        layer: Packed,
        read: Scale,
        given: Optional[Scale],
        added: Optional[Scale] = None,
        factor: Optional[Tensor] = None,
    ) -> None:
        super().__init__(layer, layer.activation)
        self.read, self.given, self.added = read, given, added
        self.dtype = layer.weight.dtype
        self.out_channels = len(layer.weight)
        self.interleaves = isinstance(layer, FusedUpsample)
        self.geometry = None
        if isinstance(layer, FusedConv2d):
            padding, stride, dilation, groups = layer._geometry()
            self.geometry = (stride, padding, dilation, groups)
        # oneDNN fuses GELU into products of matrices alone.
        self.is_linear = self.geometry is None or self.attribute == 'gelu'
        weight = layer.weight.float()
        if factor is not None:
            weight = weight * factor
        if self.is_linear:
            weight = weight.flatten(1)
        steps = weight.abs().flatten(1).amax(1) / most_weight()
        steps[steps == 0] = 1
        weight = weight.transpose(0, -1).div(steps).round().transpose(0, -1)
        self.weight = nn.Parameter(weight.to(torch.int8).contiguous(), False)
        if layer.bias is not None:
            self.bias = nn.Parameter(layer.bias.float(), False)
        self.register_buffer('steps', steps)
        self.register_buffer('zeros', torch.zeros_like(steps).int())

    def _pack(self, shape: torch.Size) -> Tensor:
        if self.is_linear:
            return onednn.qlinear_prepack(self.weight, None)
        # Of a layout that another shape wants, each call makes its own.
        return onednn.qconv_prepack(
            *(self.weight, self.steps, *self.read[:2], *self.geometry),
            list(shape),
        )

    def _bytes(self, x: Tensor, scale: Scale) -> Tuple[Tensor, float, int]:
        """Bytes, their step and zero."""
        if isinstance(x, ByteMap) and x.key is not None:
            return x.held, *x.key[:2]
        if x.dtype != torch.uint8:
            x = to_bytes(as_floats(x), scale)
        return x, *scale[:2]

    def _weights(self, x: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        return self.packed(x), self.steps, self.zeros

    def _like(self, x: Tensor, out: Tensor) -> Tensor:
        if x.dtype == torch.uint8 or self.given is None:
            return out
        return ByteMap(out, self.dtype, self.given)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C_out, H', W'), or (N, C_in) alike."""
        data, *scale = self._bytes(x, self.read)
        to = (1.0, 0, self.dtype)
        if self.given is not None:
            to = (*self.given[:2], torch.uint8)
        to = (*to, self.attribute, [], self.algorithm)
        if self.is_linear:
            is_map = self.geometry is not None
            rows = data.permute(0, 2, 3, 1) if is_map else data
            out = onednn.qlinear_pointwise(
                *(rows.flatten(0, -2), *scale, *self._weights(data)),
                *(self.bias, *to),
            ).view(*rows.shape[:-1], self.out_channels)
            out = out.permute(0, 3, 1, 2) if is_map else out
        else:
            out = onednn.qconv2d_pointwise(
                *(data, *scale, *self._weights(data), self.bias),
                *(*self.geometry, *to),
            )
        return self._like(x, interleave(out) if self.interleaves else out)

    def _add(self, x: Tensor, y: Tensor, attribute: str) -> Tensor:
        data, *scale = self._bytes(x, self.read)
        into, *added = self._bytes(y, self.added)
        out = onednn.qconv2d_pointwise.binary(
            *(data, *scale, *self._weights(data), into, self.bias),
            *(*self.geometry, *self.given[:2], torch.uint8, *added),
            *('sum', 1.0, attribute, [], ''),
        )
        return self._like(y, out)

    def add_relu(self, x: Tensor, y: Tensor) -> Tensor:
        """ReLU of ``y``, which it overwrites, plus what ``x`` makes."""
        return self._add(x, y, 'relu')

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """Add what ``x`` makes to ``y``."""
        return self._add(x, y, 'none')


class Int8Block(InPlaceBlock):
    """A block whose layers read and give plain bytes.

    What the partial convolution gives joins the block's map on a scale of its
    own; the weights of the next one make up for that.

    Args:
        dim_conv3 (int): Channels of the partial convolution.
        layers (Sequence[FusedConv2d]): Of the block, in order.
        scales (Sequence[Scale]): Of the block's map, and of what the layers
            give.
    """

    def __init__(
        self,
        dim_conv3: int,
        layers: Sequence[FusedConv2d],
        scales: Sequence[Scale],
    ) -> None:
        nn.Module.__init__(self)
        partial_conv3, expand, reduce = layers
        read, mixed, hidden, given = scales
        self.dim_conv3, self.read, self.given = dim_conv3, read, given
        self.dtype = expand.weight.dtype
        factor = torch.ones(expand.in_channels, 1, 1)
        factor[:dim_conv3] = mixed.step / read.step
        self.partial_conv3 = Int8Layer(partial_conv3, read, mixed)
        self.expand = Int8Layer(expand, read, hidden, factor=factor)
        self.reduce = Int8Layer(reduce, hidden, given, read)
        shift = self.expand.weight[:, :dim_conv3].flatten(1).sum(1)
        shift = shift * self.expand.steps
        shift *= read.step * (read.zero - mixed.zero)
        if expand.bias is not None:
            shift += expand.bias
        self.expand.bias = nn.Parameter(shift, False)

    def forward(self, x: Tensor) -> ByteMap:
        """Map (N, C, H, W) to such a map, in the same memory."""
        if isinstance(x, ByteMap) and x.key == self.read:
            x = x.held
        else:
            x = to_bytes(as_floats(x), self.read)
        return ByteMap(super().forward(x), self.dtype, self.given)


# ---- trials


class Trial(nn.Module):
    """A layer of which it is found out what 8 bits do to it.

    Args:
        layer (FusedConv2d | FusedLinear): The layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.read, self.added, self.given = Range(True), Range(True), Range()
        self.int8: Optional[nn.Module] = None
        self.signal = self.noise = 0.0

    def form(self) -> nn.Module:
        """Make its form of 8 bits."""
        added = self.added.scale() if self.added.samples else None
        scales = (self.read.scale(), self.given.scale(), added)
        return Int8Layer(self.layer, *scales)

    def in_bytes(self) -> bool:
        """Whether it is computed in 8 bits."""
        return self.int8 is not None

    def result(self) -> nn.Module:
        """The form to use."""
        if not self.in_bytes():
            return self.layer
        form = self.form()
        if not (self.given.in_bytes() or form.added):
            form.given = None
        return form

    def _seen(self, x: Tensor, range: Range) -> Tensor:
        x = x.read(self) if isinstance(x, Observed) else x
        range.observe(x)
        return x

    def _try(self, call: Callable, *maps: Tensor) -> Observed:
        # First in 8 bits, since the other may overwrite what it reads.
        found = call(self.int8, *maps) if self.int8 else None
        out = call(self.layer, *maps)
        if found is None:
            self.given.observe(out)
        else:
            expected = out if self.given.is_signed else out.clamp(min=0)
            self.noise += (found - expected).square().sum().item()
            self.signal += expected.square().sum().item()
        return Observed(out, out.dtype, self.given)

    def forward(self, x: Tensor) -> Observed:
        """As the layer's."""
        return self._try(lambda layer, x: layer(x), self._seen(x, self.read))

    def add_relu(self, x: Tensor, y: Tensor) -> Observed:
        """As the layer's."""
        maps = self._seen(x, self.read), self._seen(y, self.added)
        return self._try(lambda layer, x, y: layer.add_relu(x, y), *maps)


class BlockTrial(Trial):
    """A block on trial.

    Args:
        block (InPlaceBlock): The block; some of its layers are replaced.
    """

    def __init__(self, block: InPlaceBlock) -> None:
        super().__init__(block)
        self.sources = set()  # ranges of what it reads
        self.layers = (block.partial_conv3, block.expand, block.reduce)
        block.partial_conv3, block.expand = map(Trial, self.layers[:2])
        block.expand.out_channels = self.layers[1].out_channels

    def form(self) -> Int8Block:  # noqa: D102
        (source,) = self.sources if len(self.sources) == 1 else (None,)
        block = self.layer
        ranges = (
            *(source or self.read, block.partial_conv3.given),
            *(block.expand.given, self.given),
        )
        scales = [range.scale() for range in ranges]
        return Int8Block(block.dim_conv3, self.layers, scales)

    def result(self) -> nn.Module:  # noqa: D102
        if self.in_bytes():
            return self.form()
        self.layer.partial_conv3, self.layer.expand = self.layers[:2]
        return self.layer

    def forward(self, x: Tensor) -> Observed:  # noqa: D102
        self.sources.add(x.key if isinstance(x, Observed) else None)
        return super().forward(x)


def _conv_trial(conv: FusedConv2d) -> Optional[Trial]:
    """Unless oneDNN has no kernel for it, or none that is fast."""
    per_group = conv.in_channels // conv.groups
    is_pointwise = conv.kernel_size == conv.stride == (1, 1)
    if (
        conv.in_channels < LEAST_CHANNELS
        or (per_group % 8 and conv.groups not in (1, conv.in_channels))
        or (conv.attribute == 'gelu' and not is_pointwise)
    ):
        return None
    return Trial(conv)


TRIALS: Dict[type, Builder] = {
    FusedConv2d: _conv_trial,
    FusedUpsample: _conv_trial,
    FusedLinear: Trial,
    InPlaceBlock: BlockTrial,
}
RESULTS: Dict[type, Builder] = {
    Trial: Trial.result,
    BlockTrial: BlockTrial.result,
}


# ---- models


def _floats_after(module: nn.Module, args: tuple, output: Any) -> Any:
    return as_floats(output)


def check(model: nn.Module, calibration: Iterable) -> List[Any]:
    """Make a list of calibration batches, if the model can take them.

    Args:
        model (nn.Module): A detector, or another module.
        calibration (Iterable): See :func:`~fasternet_det.deploy.optimize`.

    Returns:
        list: The batches.

    Raises:
        ValueError: If there are none, or more than MOST_BATCHES, or they are
            not for the model.
    """
    # A training's dataloader may never end.
    batches = list(islice(calibration, MOST_BATCHES + 1))
    if len(batches) > MOST_BATCHES:
        raise ValueError(
            f'calibration gives more than {MOST_BATCHES} batches, which are '
            'all held in memory, and some tens of images are enough: give '
            'itertools.islice(loader, 32)'
        )
    expected = 'tensors (N, C, H, W)'
    fit = [isinstance(b, Tensor) and b.dim() == 4 for b in batches]
    if isinstance(model, BaseDetector):
        expected = (
            "dicts of 'inputs' and 'data_samples', as a dataloader gives and "
            'test_step takes them'
        )
        fit = [isinstance(b, Mapping) and 'inputs' in b for b in batches]
    if not (batches and all(fit)):
        kinds = {type(batch).__name__ for batch in batches}
        raise ValueError(
            f'calibration gives {len(batches)} batches, of '
            f'{", ".join(sorted(kinds)) or "nothing"}: a '
            f'{type(model).__name__} wants some tens of images, in {expected}'
        )
    return batches


def quantize(model: nn.Module, last: nn.Module, batches: List[Any]) -> None:
    """Replace the layers in a fast form by those of 8 bits.

    What predicts scores and boxes stays as it is, so do layers of few
    channels, such as an image's, and those that would lose too much: a line
    of mmengine's log names these.

    Args:
        model (nn.Module): The fast form, in float32 or bfloat16.
        last (nn.Module): Its last part, of which others read the output.
        batches (list): What it is run on.

    Raises:
        ValueError: If it is a layer or block itself, or nothing in it can be
            computed in 8 bits.
    """
    if type(model) in TRIALS:
        raise ValueError(
            'torch.int8 is for models of several layers: wrap a single one in '
            'nn.Sequential'
        )
    known: Dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        names = predictors(module) or ()
        known |= {c: c for n, c in module.named_children() if n in names}
    last.register_forward_hook(_floats_after)
    fuse(model, known, TRIALS)
    trials = {
        name: module
        for name, module in model.named_modules()
        if module in known.values() and isinstance(module, Trial)
    }
    run = model.test_step if isinstance(model, BaseDetector) else model
    for batch in batches:
        run(batch)
    for trial in trials.values():
        trial.int8 = trial.form() if trial.read.samples else None
    for batch in batches:
        run(batch)
    kept = []
    for name, trial in trials.items():
        noise = (trial.noise / (trial.signal or 1)) ** 0.5
        if trial.int8 is None or noise > MOST_NOISE:
            why = f'{noise:.0%}' if trial.int8 else 'not reached'
            kept.append(f'{name} ({why})')
            trial.int8 = None
    fuse(model, {}, RESULTS)
    done = f'{len(trials) - len(kept)} of {len(trials)} layers'
    if len(kept) == len(trials):
        raise ValueError(
            f'torch.int8 suits {done} of this {type(model).__name__}: use '
            'torch.float32'
        )
    lost = f'; not those that would lose more: {", ".join(kept)}' * bool(kept)
    print_log(
        f'optimize: {done} in 8 bits, by {len(batches)} batches{lost}',
        logger='current',
        level=logging.INFO,
    )
