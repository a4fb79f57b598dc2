"""Operators of the inference form: fused, prepacked, in place.

On a CPU they call oneDNN's fused kernels, which torch's own compiler calls
too; elsewhere, and in float64, they are the plain operators in the same order.
"""

import platform
from functools import lru_cache
from math import prod
from typing import Callable, Dict, FrozenSet, Iterable, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmcv.ops import RoIAlign
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from torch import Tensor

from ..backbones.fasternet import FasterNetBlock
from ..backbones.g_ghost_regnet import Bottleneck
from . import winograd
from .memory import new_empty

# What oneDNN calls the activations that it fuses: attribute and algorithm.
FUSED = {
    nn.Identity: ('none', ''),
    nn.ReLU: ('relu', ''),
    nn.GELU: ('gelu', 'none'),
    nn.SiLU: ('swish', ''),
}
# A prepacked weight suits one input shape. Of 1x1 convolutions nearly all have
# one layout, of 3x3 ones those of one width: a pyramid has five, and images
# lie or stand.
KEPT_LAYOUTS, KEPT_SHAPES = 16, 256
# the weight, its version, and its copies by what they suit
NOTHING_PACKED: Tuple[Optional[Tensor], int, Dict[torch.Size, Tensor]]
NOTHING_PACKED = (None, 0, {})
# Bytes of hidden map that a block computes at a time. It then stays in the
# CPU's last cache, and malloc has memory for it; see memory.py.
TILE = 2**23


def fuses(activation: nn.Module) -> bool:
    """Whether an activation can be part of a convolution's kernel."""
    return type(activation) in FUSED and (
        getattr(activation, 'approximate', 'none') == 'none'
    )


@lru_cache(maxsize=None)
def kernel_dtypes() -> FrozenSet[torch.dtype]:
    """In which dtypes oneDNN computes on this CPU, if at all.

    Its operators are private to torch: where one is missing, all modules here
    compute by plain operators. torch.int8 has none of these.
    """
    names = (
        *('_convolution_pointwise', '_reorder_convolution_weight'),
        *('_convolution_pointwise_', '_linear_pointwise'),
        *('_reorder_linear_weight', '_is_mkldnn_bf16_supported'),
    )
    kernels = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not all(
        hasattr(kernels, name) for name in names
    ):
        return frozenset()
    dtypes = {torch.float32}
    # torch asks for AVX-512 alone: where that has no bfloat16, oneDNN
    # computes in float32 and converts.
    has_bfloat16 = getattr(torch.cpu, '_is_avx512_bf16_supported', bool)
    converts = platform.machine() in ('x86_64', 'AMD64') and not has_bfloat16()
    if kernels._is_mkldnn_bf16_supported() and not converts:
        dtypes.add(torch.bfloat16)
    kernels = torch.ops.onednn
    conv = getattr(kernels, 'qconv2d_pointwise', None)
    # Older torch has the weight behind what it is added to.
    if (
        hasattr(kernels, 'qlinear_pointwise')
        and hasattr(conv, 'binary')
        and conv.binary._schema.arguments[3].name == 'qw'
    ):
        dtypes.add(torch.int8)
    return frozenset(dtypes)


def _has_kernel(x: Tensor) -> bool:
    """Whether oneDNN computes on such a tensor."""
    return x.device.type == 'cpu' and x.dtype in kernel_dtypes()


def _rows(height: int, size: int) -> int:
    """Rows of tiles of at most TILE bytes, of a map of ``size`` bytes."""
    tiles = max(1, min(height, -(-size // TILE)))
    return -(-height // tiles)


def _memory_format(x: Tensor) -> torch.memory_format:
    if x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _shared(packed: Tensor, kept: Iterable[Tensor]) -> Tensor:
    """What is kept of the layout of a packed weight, or that itself."""
    layout = getattr(torch.ops.mkldnn, '_get_mkldnn_serialized_md', None)
    if layout is None or not packed.is_mkldnn:
        return packed
    wanted = layout(packed)
    for other in {id(copy): copy for copy in kept}.values():
        if other.is_mkldnn and torch.equal(layout(other), wanted):
            return other
    return packed


class Packed(nn.Module):
    """A weight with copies in the layouts that oneDNN wants.

    The copies are made when needed, follow the weight's version, and belong to
    no state dict or pickle.
    """

    def __init__(self, layer: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.weight = layer.weight
        self.bias = layer.bias
        self.activation = activation
        self.attribute, self.algorithm = FUSED[type(activation)]
        self._packed = NOTHING_PACKED

    def _suited(self, shape: torch.Size) -> torch.Size:
        """What the layout for an input of this shape depends on."""
        return shape[2:]

    def _pack(self, shape: torch.Size) -> Tensor:
        raise NotImplementedError

    def packed(self, x: Tensor) -> Tensor:
        """The weight in the layout for an input of this shape.

        One for all batch sizes, as that of regions varies: where oneDNN wants
        another layout for one, it makes that in each call.
        """
        weight = self.weight
        version = 0 if weight.is_inference() else weight._version
        # Read and replaced as one, since threads may share the module. The
        # source is kept alive, so that no other weight has its address.
        source, known, kept = self._packed
        if (
            source is None
            or source.data_ptr() != weight.data_ptr()
            or known != version
        ):
            source, kept = weight.data, {}
        key = self._suited(x.shape)
        if key not in kept:
            packed = _shared(self._pack(x.shape), kept.values())
            kept = {**kept, key: packed}
            while (
                len(kept) > KEPT_SHAPES
                or len(set(map(id, kept.values()))) > KEPT_LAYOUTS
            ):
                del kept[next(iter(kept))]  # the oldest
            self._packed = source, version, kept
        return kept[key]

    def __getstate__(self) -> dict:
        return self.__dict__ | dict(_packed=NOTHING_PACKED)


class FusedConv2d(Packed):
    """A convolution and its activation as one operator.

    Args:
        conv (nn.Conv2d): The convolution, padded with zeros.
        activation (nn.Module, optional): One that :func:`fuses`.
            Defaults to None.
    """

    def __init__(
        self, conv: nn.Conv2d, activation: Optional[nn.Module] = None
    ) -> None:
        super().__init__(conv, activation or nn.Identity())
        self.in_channels = conv.in_channels
        self.out_channels = conv.out_channels
        self.kernel_size = conv.kernel_size
        self.padding = conv.padding
        self.stride = conv.stride
        self.dilation = conv.dilation
        self.groups = conv.groups
        self.winograd = True

    def _by_winograd(self, shape: torch.Size) -> bool:
        """Whether an input of this shape is convolved by Winograd's tiles."""
        return (
            self.winograd
            and self.weight.dtype == torch.float32
            and self.kernel_size == (3, 3)
            and self._geometry() == ((1, 1), (1, 1), (1, 1), 1)
            and winograd.wins(shape, self.out_channels)
        )

    def _suited(self, shape: torch.Size) -> torch.Size:
        if self._by_winograd(shape):
            return torch.Size([winograd.tiles(shape, self.out_channels)])
        return shape[2:]

    def _pack(self, shape: torch.Size) -> Tensor:
        if self._by_winograd(shape):
            return winograd.transform(self.weight, shape)
        return torch.ops.mkldnn._reorder_convolution_weight(
            self.weight, *self._geometry(), list(shape)
        )

    def _geometry(self) -> Tuple[Tuple[int, int], ...]:
        return self.padding, self.stride, self.dilation, self.groups

    def _run(
        self, kernel: Callable, maps: tuple, x: Tensor, fused: tuple
    ) -> Tensor:
        """Call a kernel; its maps hold ``x``, which the convolution reads."""
        return kernel(
            *maps, self.packed(x), self.bias, *self._geometry(), *fused
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C_out, H', W')."""
        if _has_kernel(x):
            if self._by_winograd(x.shape):
                return winograd.convolve(
                    x, self.packed(x), self.bias, self.activation
                )
            kernel = torch.ops.mkldnn._convolution_pointwise
            return self._run(
                kernel, (x,), x, (self.attribute, [], self.algorithm)
            )
        padding, stride, dilation, groups = self._geometry()
        out = F.conv2d(
            x, self.weight, self.bias, stride, padding, dilation, groups
        )
        return self.activation(out)

    def add_relu(self, x: Tensor, y: Tensor) -> Tensor:
        """ReLU of ``y`` plus what is computed from ``x``."""
        if not _has_kernel(x) or self._by_winograd(x.shape):
            return F.relu(y + self(x))
        kernel = torch.ops.mkldnn._convolution_pointwise.binary
        return self._run(kernel, (x, y), x, ('add', 1, 'relu', [], None))

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """Add what is computed from ``x``, without activation, to ``y``."""
        if not _has_kernel(x) or self._by_winograd(x.shape):
            return y.add_(self(x))
        kernel = torch.ops.mkldnn._convolution_pointwise_.binary
        return self._run(kernel, (y, x), x, ('add', 1, None, [], None))


class Predictor(FusedConv2d):
    """A convolution that gives scores or deltas, in float32.

    Args:
        conv (FusedConv2d): The convolution, in any dtype.
    """

    def __init__(self, conv: FusedConv2d) -> None:
        super().__init__(conv, conv.activation)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, H, W) of any dtype to (N, C_out, H', W')."""
        forward = super().forward
        if (
            x.dtype == torch.float32
            or x.device.type != 'cpu'
            or self.kernel_size != (1, 1)
        ):
            return forward(x.float())
        rows = _rows(x.shape[2], 4 * x.numel())  # what is cast stays in cache
        return torch.cat([forward(t.float()) for t in x.split(rows, 2)], 2)


def interleave(quads: Tensor) -> Tensor:
    """Map (N, 4 * C, H, W), of 2x2 pixels y, x, to (N, C, 2H, 2W)."""
    return (
        quads.permute(0, 2, 3, 1)
        .unflatten(3, (2, 2, -1))
        .transpose(2, 3)  # N, H, y, W, x, C
        .flatten(3, 4)
        .flatten(1, 2)
        .permute(0, 3, 1, 2)
    )


class FusedUpsample(FusedConv2d):
    """A 2x2 transposed convolution of stride 2, as a 1x1 convolution.

    Args:
        deconv (nn.ConvTranspose2d): The transposed convolution.
        activation (nn.Module, optional): One that :func:`fuses`.
            Defaults to None.
    """

    def __init__(
        self,
        deconv: nn.ConvTranspose2d,
        activation: Optional[nn.Module] = None,
    ) -> None:
        conv = nn.Conv2d(deconv.in_channels, 4 * deconv.out_channels, 1)
        weight = deconv.weight.permute(2, 3, 1, 0)  # y, x, C_out, C_in
        conv.weight = nn.Parameter(weight.flatten(0, 2)[:, :, None, None])
        bias = deconv.bias
        conv.bias = None if bias is None else nn.Parameter(bias.repeat(4))
        super().__init__(conv, activation)

    def _quads(self, x: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, H, W, 2, 2, C_out)."""
        quads = super().forward(x).permute(0, 2, 3, 1)
        return quads.unflatten(3, (2, 2, -1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C_in, H, W) to (N, C_out, 2H, 2W)."""
        return interleave(super().forward(x))

    def logits(self, x: Tensor, predictor: nn.Module, of: Tensor) -> Tensor:
        """Predict one class of each map, on a CPU a few maps at a time.

        Args:
            x (Tensor): Feature maps of shape (N, C_in, H, W).
            predictor (nn.Module): A 1x1 convolution of this one's output.
            of (Tensor): The channel of it to compute, of shape (N,).

        Returns:
            Tensor: Of shape (N, 2H, 2W).
        """
        weight = predictor.weight.flatten(1)[of][..., None]  # N, C_out, 1
        count = len(x)
        if x.device.type == 'cpu':
            size = self.out_channels * x[:1, 0].numel() * x.itemsize
            count = max(TILE // size, 1)
        parts = []
        for maps, kernel in zip(x.split(count), weight.split(count)):
            quads = self._quads(maps)
            out = quads.flatten(1, 4) @ kernel  # N, H * W * 4, 1
            parts.append(out.reshape(quads.shape[:-1]))
        out = torch.cat(parts)  # N, H, W, 2, 2
        if predictor.bias is not None:
            out += predictor.bias[of][:, None, None, None, None]
        return out.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class FusedLinear(Packed):
    """A linear layer on oneDNN, where torch's own calls MKL.

    Args:
        linear (nn.Linear): The layer.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear, nn.Identity())
        self.in_features = linear.in_features
        self.out_features = linear.out_features

    def _pack(self, shape: torch.Size) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(self.weight, shape[0])

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_features) to (N, out_features)."""
        if x.dim() != 2 or not _has_kernel(x):
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(
            x, self.packed(x), self.bias, self.attribute, [], self.algorithm
        )


class FlattenPixels(nn.Module):
    """Pixel by pixel, as channels_last has them: that copies nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, H * W * C)."""
        return x.permute(0, 2, 3, 1).flatten(1)


class InPlaceBlock(nn.Module):
    """A FasterNetBlock that computes in its input's memory.

    The partial convolution's output takes the place of the first channels
    for as long as the 1x1 convolutions read it, so there is no concatenation
    of all channels, and the residual is added by the last convolution. The
    hidden map is computed in tiles of rows that stay in cache.

    Args:
        block (FasterNetBlock): A folded block.
    """

    def __init__(self, block: FasterNetBlock) -> None:
        super().__init__()
        expand, _, activation, reduce = block.mlp
        if block.layer_scale is not None:
            scale = block.layer_scale[:, None, None, None]
            reduce.weight = nn.Parameter(reduce.weight * scale)
        self.dim_conv3 = block.spatial_mixing.dim_conv3
        self.partial_conv3 = FusedConv2d(block.spatial_mixing.partial_conv3)
        self.expand = FusedConv2d(expand, activation)
        self.reduce = FusedConv2d(reduce)

    def forward(self, x: Tensor) -> Tensor:
        """Overwrite a map of shape (N, C, H, W) with the block's output."""
        first = x[:, : self.dim_conv3].clone(memory_format=_memory_format(x))
        mixed = self.partial_conv3(first)
        for out, mix, old in self._tiles(x, mixed, first):
            out[:, : self.dim_conv3] = mix
            hidden = self.expand(out)
            out[:, : self.dim_conv3] = old
            self.reduce.add_to(out, hidden)
        return x

    def _tiles(self, *maps: Tensor) -> Iterable[Tuple[Tensor, ...]]:
        """Cut maps into equal tiles of rows, which share their memory."""
        x = maps[0]
        # The rows of all images lie behind each other.
        height = len(x) * x.shape[2]
        row = self.expand.out_channels * x.shape[3] * x.itemsize
        rows = _rows(height, height * row)
        if (
            rows == height
            or x.device.type != 'cpu'
            or _memory_format(x) != torch.channels_last
        ):
            return [maps]
        return zip(
            *(
                m.permute(0, 2, 3, 1)  # N, H, W, C
                .flatten(0, 1)[None]  # 1, N * H, W, C
                .permute(0, 3, 1, 2)
                .split(rows, dim=2)
                for m in maps
            )
        )


class FastBottleneck(nn.Module):
    """A folded Bottleneck of G-GhostNet, the residual added by the last
    convolution.

    Args:
        block (Bottleneck): The block, its norms folded.
    """

    def __init__(self, block: Bottleneck) -> None:
        super().__init__()
        self.conv1 = FusedConv2d(block.conv1, nn.ReLU())
        self.conv2 = FusedConv2d(block.conv2, nn.ReLU())
        self.conv3 = FusedConv2d(block.conv3)
        self.downsample = block.downsample
        if not isinstance(block.downsample, nn.Identity):
            self.downsample = FusedConv2d(block.downsample[0])

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C', H, W) to (N, C, ceil(H / stride), ceil(W / stride))."""
        return self.conv3.add_relu(
            self.conv2(self.conv1(x)), self.downsample(x)
        )


class FastRoIAlign(RoIAlign):
    """RoIAlign on a CPU as weighted sums of rows, for maps in channels_last.

    The mean over a bin's bilinear samples is a weighted sum of the pixels
    around them: an embedding bag, which torch vectorises over the channels
    and runs on all cores. It computes in float32. Mask R-CNN, arXiv
    1703.06870, Sec. 3; equal to mmcv's average RoIAlign with as many samples
    as a bin has pixels (``sampling_ratio=0``), which computes elsewhere.
    """

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """Pool the regions of interest.

        Args:
            input (Tensor): Feature map of shape (N, C, H, W).
            rois (Tensor): Image index, x1, y1, x2, y2 in pixels of the image,
                of shape (K, 5).

        Returns:
            Tensor: Of shape (K, C, *output_size), in channels_last.
        """
        channels = input.shape[1]
        out = new_empty(input, len(rois), *self.output_size, channels)
        rows = torch.arange(len(rois), device=rois.device)
        self.pool(input, rois, out, rows)
        return out.permute(0, 3, 1, 2)

    def pool(
        self, input: Tensor, rois: Tensor, out: Tensor, rows: Tensor
    ) -> None:
        """Pool regions into ``rows``, (K,), of ``out``, (K', h, w, C)."""
        if input.device.type != 'cpu':  # mmcv's kernel reads (N, C, H, W)
            x = super().forward(input.float().contiguous(), rois)
            out[rows] = x.permute(0, 2, 3, 1).to(out.dtype)
            return
        channels, height, width = input.shape[1:]
        image = rois[:, 0].long() * (height * width)
        boxes = rois[:, 1:] * self.spatial_scale - 0.5 * self.aligned
        grid_y, ys, weight_y = self._axis(boxes[:, 1::2], 0, height)
        grid_x, xs, weight_x = self._axis(boxes[:, 0::2], 1, width)
        pixels = input.permute(0, 2, 3, 1).reshape(-1, channels)
        step = channels
        if pixels.dtype != torch.float32:
            # Whole cache lines, of 32 channels each in 16 bits.
            step = max(32, TILE // (4 * len(pixels)) // 32 * 32)
        bins = prod(self.output_size)
        at_a_time = max(1, TILE // (4 * bins * step))
        # Regions with as many samples a bin have bags of equal size.
        groups = []
        for gy, gx in torch.stack((grid_y, grid_x), 1).unique(dim=0).tolist():
            found = ((grid_y == gy) & (grid_x == gx)).nonzero()[:, 0]
            for k in found.split(at_a_time):
                y, wy = (v[k, :, : gy + 1] for v in (ys, weight_y))
                x, wx = (v[k, :, : gx + 1] for v in (xs, weight_x))
                index = image[k, None, None] + y * width
                index = index[:, :, None, :, None] + x[:, None, :, None, :]
                weight = wy[:, :, None, :, None] * wx[:, None, :, None, :]
                bags = (v.flatten(3).flatten(0, 2) for v in (index, weight))
                groups.append((rows[k], *bags))
        for first in range(0, channels, step):
            part = pixels[:, first : first + step].float()
            for k, index, weight in groups:
                sums = F.embedding_bag(
                    index, part, per_sample_weights=weight, mode='sum'
                )
                sums = sums.view(len(k), *self.output_size, -1).to(out.dtype)
                out[k, ..., first : first + step] = sums

    def _axis(
        self, bounds: Tensor, axis: int, size: int
    ) -> Tuple[Tensor, Tensor, Tensor]:
        """Find the pixels that the bins of each region read along an axis.

        Args:
            bounds (Tensor): Start and end of the regions, of shape (K, 2).
            axis (int): 0 for y, 1 for x.
            size (int): Pixels of the map along the axis.

        Returns:
            tuple[Tensor]: Samples a bin, of shape (K,); pixels, and weights,
            of shape (K, bins, most samples + 1).
        """
        bins = self.output_size[axis]
        start, length = bounds[:, 0], bounds[:, 1] - bounds[:, 0]
        if not self.aligned:
            length = length.clamp(min=1)
        step = (length / bins)[:, None, None]
        grid = step.ceil().clamp(min=0)
        most = max(1, int(grid.max()))
        sample = torch.arange(most, device=step.device)
        at = (
            start[:, None, None]
            + torch.arange(bins, device=step.device)[:, None] * step
            + (sample + 0.5) * (step / grid.clamp(min=1))
        )
        share = (sample < grid) & (at >= -1) & (at <= size)
        share = share / grid.clamp(min=1)
        at = at.clamp(0, size - 1)
        low = at.floor()
        first = low[..., :1]
        # Samples lie at most a pixel apart: a bin spans one pixel more than
        # it has samples. The excess of regions with fewer has no share.
        place = (low - first).clamp(max=most - 1).long()
        weight = at.new_zeros(len(at), bins, most + 1)
        weight.scatter_add_(2, place, share * (1 - (at - low)))
        weight.scatter_add_(2, place + 1, share * (at - low))
        pixel = first.long() + torch.arange(most + 1, device=step.device)
        return grid.flatten().long(), pixel.clamp(max=size - 1), weight


class FastRoIExtractor(SingleRoIExtractor):
    """A SingleRoIExtractor of FastRoIAlign, its output in channels_last.

    Args:
        extractor (SingleRoIExtractor): One that averages, with as many samples
            as a bin has pixels.
    """

    def __init__(self, extractor: SingleRoIExtractor) -> None:
        layer = extractor.roi_layers[0]
        super().__init__(
            roi_layer=dict(
                type=FastRoIAlign,
                output_size=layer.output_size,
                sampling_ratio=0,
                aligned=layer.aligned,
            ),
            out_channels=extractor.out_channels,
            featmap_strides=extractor.featmap_strides,
            finest_scale=extractor.finest_scale,
        )

    def forward(
        self,
        feats: Tuple[Tensor, ...],
        rois: Tensor,
        roi_scale_factor: Optional[float] = None,
    ) -> Tensor:
        """Pool each region from the level that suits its size.

        Args:
            feats (tuple[Tensor]): Maps of shape (N, C, H, W).
            rois (Tensor): Image index, x1, y1, x2, y2 in pixels, (K, 5).
            roi_scale_factor (float, optional): Factor on the regions' sizes.
                Defaults to None.

        Returns:
            Tensor: Of shape (K, C, *output_size), in channels_last.
        """
        height, width = self.roi_layers[0].output_size
        out = new_empty(feats[0], len(rois), height, width, self.out_channels)
        levels = self.map_roi_levels(rois, len(feats))
        # As in mmdet, which does not scale them for a single level.
        if roi_scale_factor is not None and len(feats) > 1:
            rois = self.roi_rescale(rois, roi_scale_factor)
        for level in levels.unique().tolist():
            rows = (levels == level).nonzero()[:, 0]
            self.roi_layers[level].pool(feats[level], rois[rows], out, rows)
        return out.permute(0, 3, 1, 2)
