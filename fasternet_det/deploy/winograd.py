"""3x3 convolutions in a quarter of the multiplications.

Winograd's minimal filtering F(4x4, 3x3): a tile of 6x6 pixels and a filter,
both transformed, are multiplied point by point, where the direct convolution
multiplies each of 4x4 outputs with 3x3 weights: 36 products for 144. Lavin and
Gray, arXiv 1509.09308, Sec. 4. All of it is matrix products, by torch's own
operators: there is nothing to install, or to compile.
"""

from math import prod
from typing import Optional, Tuple

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from torch.backends.cpu import get_cpu_capability

from .memory import new_empty

# At which the polynomials are multiplied, infinity beside them. Over 256
# channels they lose 2.3e-6 of the largest value in float32, the usual
# 0, 1, -1, 2, -2 6.2e-6, the direct convolution 1.3e-6.
POINTS = np.array([0, 1, -1, 0.5, -2])
# Bytes of transformed map at a time, so that it stays in the CPU's last cache.
BAND = 2**23
# Where it is faster than oneDNN's direct convolution: from so many tiles on,
# and with so many channels, less what is wasted of tiles that reach over the
# edge, and some more where tiles are few, for what each call takes. Measured
# with 64 to 512 channels and maps of 7x10 to 200x304, on CPUs with AVX-512 and
# with AVX2; see docs/benchmark.md.
LEAST_TILES, TILES_TIMES_MORE = 16, 1500
LEAST_CHANNELS = 72 if get_cpu_capability() == 'AVX2' else 112


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


def transform(weight: Tensor) -> Tensor:
    """Transform filters.

    Args:
        weight (Tensor): Of shape (C_out, C_in, 3, 3).

    Returns:
        Tensor: Of shape (36, C_in, C_out).
    """
    points = torch.einsum('ay,bx,oiyx->baio', G, G, weight.double())
    return points.flatten(0, 1).to(weight.dtype).contiguous()


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
    out_channels = transformed.shape[2]
    x = x.permute(0, 2, 3, 1)
    out = new_empty(x, n, height, width, out_channels)
    down, across = -(-height // 4), -(-width // 4)  # tiles
    # as many rows of tiles as fit into a band, of one image or of whole ones
    row = 36 * across * max(c, out_channels)
    rows = max(1, BAND // (row * x.itemsize))
    images, rows = min(n, max(1, rows // down)), min(rows, down)
    buffers = x.new_empty(2, images * rows * row)
    for band, into in zip(x.split(images), out.split(images)):
        for top in range(0, height, 4 * rows):
            # with the pixels around
            first, last = max(0, top - 1), min(height, top + 4 * rows + 1)
            _convolve(
                band[:, first:last],
                first - (top - 1),
                transformed,
                bias,
                activation,
                into[:, top : top + 4 * rows],
                buffers,
            )
    return out.permute(0, 3, 1, 2)


def _convolve(
    x: Tensor,
    above: int,
    transformed: Tensor,
    bias: Optional[Tensor],
    activation: nn.Module,
    out: Tensor,
    buffers: Tensor,
) -> None:
    """Convolve a band, (n, rows + 1 or 2, W, C_in), into ``out``, (n, rows, W,
    C_out).

    ``above`` of its rows are missing. Each step writes the buffer that the
    step after it reads.
    """
    a, b = A.to(x.dtype), B.to(x.dtype)
    n, height, width, out_channels = out.shape
    c = x.shape[3]
    down, across = -(-height // 4), -(-width // 4)
    tiles = n * down * across

    def cut(buffer: int, *shape: int) -> Tensor:
        return buffers[buffer, : prod(shape)].view(shape)

    padded = cut(1, n, 4 * down + 2, 4 * across + 2, c).zero_()
    padded[:, above : above + x.shape[1], 1 : width + 1] = x
    # Rows of the tiles are transformed first, while tiles that overlap in a
    # row still share their pixels, then columns.
    image, line, _, _ = padded.stride()
    lines = padded.as_strided((n, down, 6, line), (image, 4 * line, line, 1))
    lines = torch.matmul(b, lines, out=cut(0, *lines.shape))
    image, line, point, _ = lines.stride()
    columns = lines.as_strided(
        (6, 6, n, down, across, c), (c, point, image, line, 4 * c, 1)
    )
    columns = cut(1, *columns.shape).copy_(columns).view(6, -1)
    points = torch.mm(b, columns, out=cut(0, *columns.shape))
    products = torch.bmm(
        points.view(36, tiles, c),
        transformed,
        out=cut(1, 36, tiles, out_channels),
    )
    products = products.view(6, -1)
    columns = torch.mm(a, products, out=cut(0, 4, products.shape[1]))
    columns = columns.view(4, 6, -1)
    pixels = torch.matmul(a, columns, out=cut(1, 4, 4, columns.shape[2]))
    pixels = pixels.view(4, 4, n, down, across, out_channels)
    if bias is not None:
        pixels += bias
    pixels = activation(pixels).permute(2, 3, 1, 4, 0, 5)
    if (height, width) == (4 * down, 4 * across):
        out.view(pixels.shape).copy_(pixels)
    else:
        pixels = pixels.flatten(3, 4).flatten(1, 2)
        out.copy_(pixels[:, :height, :width])
