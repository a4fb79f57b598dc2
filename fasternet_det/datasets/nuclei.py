"""Cut the shipped nuclei image into annotated tiles.

Usage:
    python -m fasternet_det.datasets.nuclei data/nuclei
    python -m fasternet_det.datasets.nuclei data/nuclei-16bit --kind 16bit
"""

import argparse
from pathlib import Path

import cv2
import numpy as np

from .tiles import Region, cut, write

SOURCE = Path(__file__).parent / 'nuclei_data'
SPLITS = dict(  # left and right of a column
    train=Region(0, 0, 384, 512), val=Region(384, 0, 512, 512)
)
KINDS = ('grey', '16bit', '4channel')
BLURS = (1, 2, 4)  # sigmas in pixels of the second channel and on


def _of_kind(tile: np.ndarray, kind: str) -> np.ndarray:
    """A tile (H, W) of 8 bits as one of another kind."""
    if kind == '16bit':  # as of a camera of 12 bits: most of the range is bare
        return tile.astype(np.uint16) * 16
    if kind == '4channel':  # as of a stack of focal planes
        blurred = (cv2.GaussianBlur(tile, (0, 0), sigma) for sigma in BLURS)
        return np.stack((tile, *blurred), axis=-1)
    return tile


def convert(out_dir: str, kind: str = 'grey') -> None:
    """Write ``{train,val}/*.png``, with annotations of instances and pixels.

    ``annotations/{train,val}.json`` has the instances in COCO format; masks
    are run-length encoded, so areas and boxes are the annotators' to the
    pixel. ``annotations/{train,val}/*.png`` has the class of each pixel, 1 in
    nuclei and 0 elsewhere. The two splits share no pixel.

    Args:
        out_dir (str): Folder to write to, made where it is missing.
        kind (str): Of the images: 'grey', one channel of 8 bits; '16bit', one
            of 16 bits, of which 12 are used; '4channel', four of 8 bits, the
            image and three blurred ones. Defaults to 'grey'.

    Raises:
        ValueError: If there is no such kind.
        OSError: If the folder cannot be written to.
    """
    if kind not in KINDS:
        raise ValueError(f'kind={kind!r} is not one of {", ".join(KINDS)}')
    image = cv2.imread(str(SOURCE / 'image.png'), cv2.IMREAD_GRAYSCALE)
    labels = cv2.imread(str(SOURCE / 'mask.png'), cv2.IMREAD_UNCHANGED)
    for split, region in SPLITS.items():
        tiles = (
            tile._replace(image=_of_kind(tile.image, kind))
            for tile in cut(image, labels[None], split, region)
        )
        write(out_dir, split, tiles, 'nucleus', 'Nuclei of StarDist (BSD-3)')


def main() -> None:
    """Parse the command line and convert."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('out_dir', help='folder to write to')
    parser.add_argument(
        '--kind',
        choices=KINDS,
        default='grey',
        help='of the images, made from the shipped one (default: grey)',
    )
    args = parser.parse_args()
    convert(args.out_dir, args.kind)


if __name__ == '__main__':
    main()
