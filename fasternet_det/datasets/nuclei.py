"""Cut the shipped nuclei image into annotated tiles.

Usage:
    python -m fasternet_det.datasets.nuclei data/nuclei
    python -m fasternet_det.datasets.nuclei data/nuclei-16bit --kind 16bit
"""

import argparse
from pathlib import Path
from typing import Iterator, Tuple

import cv2
import mmengine
import numpy as np
from pycocotools import mask as mask_utils

SOURCE = Path(__file__).parent / 'nuclei_data'
TILE = 128  # pixels
SPLIT = 384  # training tiles lie left of this column, validation tiles right
STRIDE = dict(train=64, val=TILE)  # training tiles overlap each other
KINDS = ('grey', '16bit', '4channel')
BLURS = (1, 2, 4)  # sigmas in pixels of the second channel and on
MIN_REMAINS = 0.4  # of a nucleus's area, for one cut by a tile's edge to count


def _tiles(split: str, height: int, width: int) -> Iterator[Tuple[int, int]]:
    """Top left corners (x, y) of a split's tiles, in pixels."""
    left, right = (0, SPLIT) if split == 'train' else (SPLIT, width)
    for y in range(0, height - TILE + 1, STRIDE[split]):
        for x in range(left, right - TILE + 1, STRIDE[split]):
            yield x, y


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
    full_area = np.bincount(labels.ravel())
    for split in STRIDE:
        images, annotations = [], []
        for x, y in _tiles(split, *labels.shape):
            tile = np.s_[y : y + TILE, x : x + TILE]
            name = f'x{x:03d}_y{y:03d}.png'
            semantic = (labels[tile] > 0).astype(np.uint8)
            for folder, pixels in (
                (split, _of_kind(image[tile], kind)),
                (f'annotations/{split}', semantic),
            ):
                path = Path(out_dir, folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                if not cv2.imwrite(str(path), pixels):
                    raise OSError(f'cannot write {path}')
            images.append(
                dict(id=len(images), file_name=name, width=TILE, height=TILE)
            )
            for label in np.unique(labels[tile]):
                mask = labels[tile] == label
                area = int(mask.sum())
                if label == 0 or area < MIN_REMAINS * full_area[label]:
                    continue
                rle = mask_utils.encode(np.asfortranarray(mask, np.uint8))
                annotations.append(
                    dict(
                        id=len(annotations) + 1,  # 0 would mean no match
                        image_id=images[-1]['id'],
                        category_id=1,
                        iscrowd=0,
                        area=area,
                        bbox=mask_utils.toBbox(rle).tolist(),
                        segmentation=dict(
                            size=rle['size'], counts=rle['counts'].decode()
                        ),
                    )
                )
        mmengine.dump(
            dict(
                info=dict(description='Nuclei of StarDist (BSD-3)'),
                images=images,
                annotations=annotations,
                categories=[dict(id=1, name='nucleus')],
            ),
            Path(out_dir, 'annotations', f'{split}.json'),
        )


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
