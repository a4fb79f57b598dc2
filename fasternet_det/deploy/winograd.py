"""3x3 convolutions in a quarter of the multiplications.

Winograd's minimal filtering F(4x4, 3x3): a tile of 6x6 pixels and a filter,
both transformed, are multiplied point by point, where the direct convolution
multiplies each of 4x4 outputs with 3x3 weights: 36 products for 144. Lavin and
Gray, arXiv 1509.09308, Sec. 4. All of it is matrix products, by torch's own
operators: there is nothing to install, or to compile.
"""

from math import prod
from typing import List, Optional, Tuple

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from .memory import new_empty

# At which the polynomials are multiplied, infinity beside them. Over 256
# channels they lose 2.3e-6 of the largest value in float32, oneDNN's order of
# summing makes it 5e-6; with the usual 0, 1, -1, 2, -2 it is 6.2e-6 and more.
POINTS = np.array([0, 1, -1, 0.5, -2])
# Bytes of transformed map at a time, so that it stays in the CPU's last cache.
BAND = 2**23
# Where it is faster than oneDNN's direct convolution: from so many tiles on,
# and with so many channels, less what is wasted of tiles that reach over the
# edge, and some more where tiles are few, for what each call takes. Measured
# with 64 to 512 channels and maps of 7x10 to 200x304, on a CPU with AVX-512,
# see docs/benchmark.md; with 80, what a quiet machine gains, one that shares
# its last cache loses.
LEAST_TILES, LEAST_CHANNELS, TILES_TIMES_MORE = 16, 88, 600


def _transforms() -> Tuple[Tensor, Tensor, Tensor]:
    """The matrices A^T (4, 6), G (6, 3) and B^T (6, 6) of the paper."""
    rest = [np.delete(POINTS, k) for k in range(len(POINTS))]
    a, g, b = np.zeros((4, 6)), np.zeros((6, 3)), np.zeros((6, 6))
    a[:, :5] = np.vander(POINTS, 4, increasing=True).T
    g[:5] = np.vander(POINTS, 3, increasing=True)
    g[:5] /= np.prod(POINTS[:, None] - rest, 1, keepdims=True)
    b[:5, :5] = [np.poly(roots)[::-1] for roots in rest]
    b[5] = np.poly(POINTS)[::-1]
    a[3, 5] = g[5, 2] = 1
    return tuple(map(torch.from_numpy, (a, g, b)))


A, G, B = _transforms()
A, B = (torch.kron(m, m).float() for m in (A, B))  # of both axes at once
# The products of all points, as a 1x1 convolution in 36 groups: oneDNN's are
# 1.2 to 1.35 times as fast as those of MKL, by ``torch.bmm``, on an AMD EPYC.
PRODUCTS = ([0, 0], [1, 1], [1, 1], 36)


def _part(total: int, most: int) -> int:
    """The size of equal parts of a total."""
    return -(-total // -(-total // most))


def _band(shape: torch.Size, out_channels: int) -> Tuple[int, int, int]:
    """Images, rows of tiles, and tiles in a row, that fit into a BAND."""
    n, c, height, width = shape
    down, across = -(-height // 4), -(-width // 4)
    row = 36 * across * max(c, out_channels) * torch.float32.itemsize
    most = max(1, BAND // row)
    return _part(n, max(1, most // down)), _part(down, most), across


def tiles(shape: torch.Size, out_channels: int) -> int:
    """How many tiles of an input (N, C_in, H, W) are computed at a time."""
    return prod(_band(shape, out_channels))


def transform(weight: Tensor, shape: torch.Size) -> Tensor:
    """Transform filters, into the layout that oneDNN wants for an input.

    Args:
        weight (Tensor): Of shape (C_out, C_in, 3, 3).
        shape (torch.Size): Of the input, (N, C_in, H, W). Inputs of as many
            :func:`tiles` want one layout.

    Returns:
        Tensor: Of shape (36 * C_out, C_in, 1, 1).
    """
    points = torch.einsum('ay,bx,oiyx->aboi', G, G, weight.double())
    points = points.flatten(0, 2)[:, :, None, None].to(weight.dtype)
    return torch.ops.mkldnn._reorder_convolution_weight(
        points,
        *PRODUCTS,
        [1, 36 * weight.shape[1], 1, tiles(shape, len(weight))],
    )


def wins(shape: torch.Size, out_channels: int) -> bool:
    """Whether that is faster for an input of a shape (N, C_in, H, W)."""
    n, c, height, width = shape
    tiles = n * -(-height // 4) * -(-width // 4)
    full = min(c, out_channels) * n * height * width
    least = 16 * (LEAST_CHANNELS * tiles + TILES_TIMES_MORE)
    return tiles >= LEAST_TILES and full >= least


def convolve(
    x: Tensor,
    transformed: Tensor,
    bias: Optional[Tensor],
    activation: nn.Module,
) -> Tensor:
    """Convolve with 3x3 filters, stride 1, zeros around.

    Args:
        x (Tensor): Of shape (N, C_in, H, W).
        transformed (Tensor): What :func:`transform` gives of the filters.
        bias (Tensor | None): Of shape (C_out,).
        activation (nn.Module): Of what comes out, element by element.

    Returns:
        Tensor: Of shape (N, C_out, H, W), in channels_last.
    """
    n, c, height, width = x.shape
    out_channels = len(transformed) // 36
    images, rows, across = _band(x.shape, out_channels)
    x = x.permute(0, 2, 3, 1)
    out = new_empty(x, n, height, width, out_channels)
    size = images * rows * across * 36 * max(c, out_channels)
    buffers = x.new_empty(2, size)
    for image in _starts(n, images):
        band, into = (m[image : image + images] for m in (x, out))
        for row in _starts(-(-height // 4), rows):
            top, bottom = 4 * row, 4 * (row + rows)
            above = min(top, 1)  # rows of pixels around
            _convolve(
                band[:, top - above : bottom + 1],
                above,
                transformed,
                bias,
                activation,
                into[:, top:bottom],
                buffers,
            )
    return out.permute(0, 3, 1, 2)


def _starts(total: int, size: int) -> List[int]:
    """Where parts of one size start; the last ends where the total does, as
    the layout of the filters depends on the size.
    """
    return [min(i, total - size) for i in range(0, total, size)]


def _convolve(
    x: Tensor,
    above: int,
    transformed: Tensor,
    bias: Optional[Tensor],
    activation: nn.Module,
    out: Tensor,
    buffers: Tensor,
) -> None:
    """Convolve a band, (n, H + 1 or 2, W, C_in), into ``out``, (n, H, W,
    C_out).

    ``above`` of its rows lie above those of ``out``. Each step writes the
    buffer that the step after it reads.
    """
    n, height, width, out_channels = out.shape
    c = x.shape[3]
    down, across = -(-height // 4), -(-width // 4)
    tiles = n * down * across

    def cut(buffer: int, *shape: int) -> Tensor:
        return buffers[buffer, : prod(shape)].view(shape)

    padded = cut(1, n, 4 * down + 2, 4 * across + 2, c).zero_()
    padded[:, 1 - above : 1 - above + x.shape[1], 1 : width + 1] = x
    image, line, pixel, _ = padded.stride()
    pixels = cut(0, n, down, across, 6, 6, c)
    strides = (image, 4 * line, 4 * pixel, line, pixel, 1)  # they overlap
    pixels.copy_(padded.as_strided(pixels.shape, strides))
    pixels, b = pixels.view(tiles, 36, c), B.expand(tiles, -1, -1)
    points = torch.bmm(b, pixels, out=cut(1, *pixels.shape))
    products = torch.ops.mkldnn._convolution_pointwise(
        points.view(1, 1, tiles, 36 * c).permute(0, 3, 1, 2),
        *(transformed, None, *PRODUCTS, 'none', [], ''),
    )
    products = products.permute(0, 2, 3, 1).view(tiles, 36, out_channels)
    a = A.expand(tiles, -1, -1)
    pixels = torch.bmm(a, products, out=cut(0, tiles, 16, out_channels))
    if bias is not None:
        pixels += bias
    pixels = activation(pixels).view(n, down, across, 4, 4, out_channels)
    pixels = pixels.transpose(2, 3)  # n, down, 4, across, 4, C_out
    if (height, width) == (4 * down, 4 * across):
        out.view(pixels.shape).copy_(pixels)
    else:
        pixels = pixels.flatten(3, 4).flatten(1, 2)
        out.copy_(pixels[:, :height, :width])
