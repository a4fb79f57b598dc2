"""Annotated tiles of large images: what the converters share."""

from pathlib import Path
from typing import Iterable, Iterator, List, NamedTuple

import cv2
import mmengine
import numpy as np
from pycocotools import mask as mask_utils

TILE = 128  # pixels
STRIDE = dict(train=64, val=TILE)  # training tiles overlap each other
MIN_REMAINS = 0.4  # of an object's area, for one cut by a tile's edge to count


class Region(NamedTuple):
    """The part of an image that a split's tiles lie in, in pixels."""

    left: int
    top: int
    right: int
    bottom: int


class Tile(NamedTuple):
    """A tile: its pixels, and of which objects they are.

    ``image`` is (TILE, TILE) or (TILE, TILE, C); ``classes`` (TILE, TILE) is 1
    in objects and 0 elsewhere; ``masks`` has a (TILE, TILE) of booleans for
    each object that counts.
    """

    name: str
    image: np.ndarray
    classes: np.ndarray
    masks: List[np.ndarray]


def cut(
    image: np.ndarray,
    labels: np.ndarray,
    split: str,
    region: Region,
    prefix: str = '',
) -> Iterator[Tile]:
    """Cut the tiles of a split, row by row.

    Args:
        image (np.ndarray): Of shape (H, W), 8 bits.
        labels (np.ndarray): Of shape (L, H, W): in L layers, as objects may
            overlap, each pixel's object, from 1; 0 elsewhere.
        split (str): 'train', whose tiles overlap, or 'val'.
        region (Region): Where the tiles lie.
        prefix (str): Of the tiles' names. Defaults to ''.

    Yields:
        Tile: One at a time, named by its place.
    """
    full_area = np.bincount(labels.ravel())
    stride = STRIDE[split]
    for y in range(region.top, region.bottom - TILE + 1, stride):
        for x in range(region.left, region.right - TILE + 1, stride):
            place = np.s_[y : y + TILE, x : x + TILE]
            inside = labels[(..., *place)]  # (L, TILE, TILE)
            masks = []
            for label in np.unique(inside):
                mask = (inside == label).any(0)
                if label and mask.sum() >= MIN_REMAINS * full_area[label]:
                    masks.append(mask)
            classes = inside.any(0).astype(np.uint8)
            name = f'{prefix}x{x:03d}_y{y:03d}.png'
            yield Tile(name, image[place], classes, masks)


def write(
    out_dir: str,
    split: str,
    tiles: Iterable[Tile],
    category: str,
    description: str,
) -> None:
    """Write the tiles of a split, with annotations of instances and pixels.

    ``annotations/SPLIT.json`` has the instances in COCO format; masks are
    run-length encoded, so areas and boxes are the source's to the pixel.
    ``annotations/SPLIT/*.png`` has the class of each pixel, 1 in objects.

    Args:
        out_dir (str): Folder to write to, made where it is missing.
        split (str): Its name.
        tiles (Iterable[Tile]): Its tiles.
        category (str): What the objects are.
        description (str): What the file says of its source and licence.

    Raises:
        OSError: If the folder cannot be written to.
    """
    images, annotations = [], []
    for tile in tiles:
        for folder, pixels in (
            (split, tile.image),
            (f'annotations/{split}', tile.classes),
        ):
            path = Path(out_dir, folder, tile.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            if not cv2.imwrite(str(path), pixels):
                raise OSError(f'cannot write {path}')
        images.append(
            dict(id=len(images), file_name=tile.name, width=TILE, height=TILE)
        )
        for mask in tile.masks:
            rle = mask_utils.encode(np.asfortranarray(mask, np.uint8))
            annotations.append(
                dict(
                    id=len(annotations) + 1,  # 0 would mean no match
                    image_id=images[-1]['id'],
                    category_id=1,
                    iscrowd=0,
                    area=int(mask.sum()),
                    bbox=mask_utils.toBbox(rle).tolist(),
                    segmentation=dict(
                        size=rle['size'], counts=rle['counts'].decode()
                    ),
                )
            )
    mmengine.dump(
        dict(
            info=dict(description=description),
            images=images,
            annotations=annotations,
            categories=[dict(id=1, name=category)],
        ),
        Path(out_dir, 'annotations', f'{split}.json'),
    )
