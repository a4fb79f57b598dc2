"""Download an image of craters, and cut it into annotated tiles.

Usage:
    python -m fasternet_det.datasets.craters data/craters
"""

import io

import cv2
import numpy as np

from .package import fetch, run
from .tiles import TILE, Region, cut, write

PACKAGE = dict(
    name='pycda',
    version='0.1.16',
    sha256='11cc0532db8b7eddcd88db8ee95ef6f7473a9f0136aa75d7c77ba63771fb8c5d',
)
SAMPLE = 'pycda-0.1.16/pycda/sample_imgs/holdout_tile'
SOURCE = (
    'Craters of PyCDA 0.1.16 (MIT, by Michael Klear, '
    'https://github.com/AlliedToasters/PyCDA), labelled by hand'
)
SIDE = 1700  # pixels
VAL_TOP = SIDE - 4 * TILE
# Above and below a strip, a tile high, that is neither's: no crater is in
# both, as the largest has a diameter of 79 pixels.
SPLITS = dict(
    train=Region(0, 0, SIDE, VAL_TOP - TILE),
    val=Region(0, VAL_TOP, SIDE, SIDE),
)


def paint(circles: np.ndarray, height: int, width: int) -> np.ndarray:
    """Paint discs, in as many layers as keep those that overlap apart.

    Args:
        circles (np.ndarray): Of shape (N, 3): x, y of the centres and
            diameters, in pixels.
        height (int): Of the image, H.
        width (int): Of the image, W.

    Returns:
        np.ndarray: Of shape (L, H, W), 0 or the number of a disc, from 1.
    """
    rows, columns = np.ogrid[:height, :width]
    layers = []
    for label, (x, y, diameter) in enumerate(circles, 1):
        radius = diameter / 2
        ys, xs = (
            slice(max(int(centre - radius), 0), int(centre + radius) + 1)
            for centre in (y, x)
        )
        disc = np.hypot(columns[:, xs] - x, rows[ys] - y) <= radius
        for layer in layers:
            if not layer[ys, xs][disc].any():
                break
        else:
            layer = np.zeros((height, width), np.uint16)
            layers.append(layer)
        layer[ys, xs][disc] = label
    return np.stack(layers)


def convert(out_dir: str) -> None:
    """Download and write ``{train,val}/*.png``, with their annotations.

    The files are those of :func:`fasternet_det.datasets.tiles.write`. A crater
    is the disc that its annotator gave, by centre and diameter. The two splits
    share no pixel and no crater.

    Args:
        out_dir (str): Folder to write to, made where it is missing.

    Raises:
        OSError: If the package cannot be downloaded, in which case nothing is
            written, or the folder cannot be written to.
    """
    pgm, table = fetch(
        **PACKAGE, members=[f'{SAMPLE}.pgm', f'{SAMPLE}_labels.csv']
    )
    image = cv2.imdecode(np.frombuffer(pgm, np.uint8), cv2.IMREAD_GRAYSCALE)
    circles = np.loadtxt(io.BytesIO(table), delimiter=',', skiprows=1)
    labels = paint(circles, *image.shape)
    for split, region in SPLITS.items():
        tiles = cut(image, labels, split, region)
        write(out_dir, split, tiles, 'crater', SOURCE)


def main() -> None:
    """Parse the command line and convert."""
    run(__doc__, convert, SOURCE)


if __name__ == '__main__':
    main()
