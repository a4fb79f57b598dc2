"""A COCO dataset that raises where mmdet would skip or misread.

What mmdet does with each case, and this, is in docs/hostile-input.md.
"""

import json
import logging
import re
from collections import Counter
from typing import Any, Dict, Iterator, List, Optional, Sequence

import cv2
import mmengine.fileio as fileio
import numpy as np
from mmcv.image.io import imread_flags
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets import CocoDataset
from mmdet.datasets.api_wrappers import COCO
from mmdet.datasets.transforms import LoadAnnotations
from mmdet.registry import DATASETS, TRANSFORMS
from mmengine.dataset import Compose
from mmengine.logging import print_log

# What entries of an annotation file must have, and what that must be.
KEYS = dict(
    images=('id', 'file_name', 'width', 'height'),
    categories=('id', 'name'),
    annotations=('id', 'image_id', 'category_id', 'bbox', 'area'),
)
NUMBER = (int, float)
KINDS = dict(
    dict.fromkeys(('id', 'image_id', 'category_id'), (int, float, str)),
    **dict.fromkeys(('file_name', 'name'), str),
    **dict.fromkeys(('width', 'height', 'area', 'iscrowd'), NUMBER),
    bbox=list,
    segmentation=(list, dict),
)
PARTS = dict(bbox=NUMBER, segmentation=list)  # what such a list holds
SHOWN = 10  # problems of a file that its error lists
# Those of a JPEG file, but for 00 and D0 to D7, which stand within its scans.
MARKER = re.compile(rb'\xff+([^\x00\x01\xd0-\xd7\xff])', re.DOTALL)


def is_cut(jpeg: bytes) -> bool:
    """Whether a JPEG file ends before its end marker does (T.81, B.1).

    Segments are passed over by their length, as they may hold thumbnails; what
    a camera adds behind the end is not looked at.
    """
    at = 2
    while marker := MARKER.search(jpeg, at):
        if marker[1] == b'\xd9':
            return False
        at = marker.end()
        at += int.from_bytes(jpeg[at : at + 2], 'big')
    return True


def decode(content: bytes, flag: int) -> np.ndarray:
    """Decode an image, or say why it cannot be read right.

    Args:
        content (bytes): The file.
        flag (int): How to read it, such as ``cv2.IMREAD_COLOR``.

    Returns:
        ndarray: The image, of shape (H, W) or (H, W, C), C in BGR order.

    Raises:
        ValueError: If it is no whole image, or would lose bits.
    """
    if not content:
        raise ValueError('the file is empty')
    # Of such a baseline JPEG, OpenCV before 4.11 makes up the rest.
    if content.startswith(b'\xff\xd8') and is_cut(content):
        raise ValueError('the JPEG file is cut short')
    image = cv2.imdecode(
        np.frombuffer(content, np.uint8), flag | cv2.IMREAD_ANYDEPTH
    )
    if image is None:
        raise ValueError('OpenCV cannot decode it: is it a whole image?')
    if flag != cv2.IMREAD_UNCHANGED and image.dtype != np.uint8:
        raise ValueError(
            f'of its {image.dtype} only 8 bits would be kept: convert it, or '
            "train with color_type='unchanged', to_float32=True: "
            'docs/config.md'
        )
    return image


@TRANSFORMS.register_module()
class LoadCheckedImageFromFile(LoadImageFromFile):
    """mmcv's ``LoadImageFromFile``, which raises rather than misreads.

    Args:
        to_float32 (bool): Whether to make the image float32. Defaults to
            False.
        color_type (str): One of mmcv's: 'color', 'grayscale', 'unchanged',
            'color_ignore_orientation' or 'grayscale_ignore_orientation'.
            Defaults to 'color'.
        backend_args (dict, optional): mmengine's file backend. Defaults to
            None.
    """

    def __init__(
        self,
        to_float32: bool = False,
        color_type: str = 'color',
        *,
        backend_args: Optional[dict] = None,
    ) -> None:
        super().__init__(to_float32, color_type, backend_args=backend_args)

    def transform(self, results: dict) -> dict:
        """Load an image.

        Args:
            results (dict): ``img_path``, and, of an annotated image, the
                ``height`` and ``width`` that its annotations are for.

        Returns:
            dict: The same with ``img``, ``img_shape`` and ``ori_shape``.

        Raises:
            ValueError: If the file is no whole image, would lose bits, or is
                of another size than annotated.
        """
        path = results['img_path']
        content = fileio.get(path, backend_args=self.backend_args)
        try:
            image = decode(content, imread_flags[self.color_type])
        except (ValueError, cv2.error) as error:
            raise ValueError(f'{path}: {error}') from error
        height, width = shape = image.shape[:2]
        annotated = results.get('height', height), results.get('width', width)
        if shape != annotated:
            raise ValueError(
                f'{path}: {width}x{height} pixels are read, but its '
                f'annotations are for {annotated[1]}x{annotated[0]}. If its '
                'EXIF orientation turns it, and its objects were marked in '
                'the unturned image, load it with '
                "color_type='color_ignore_orientation'"
            )
        if self.to_float32:
            image = image.astype(np.float32)
        return dict(results, img=image, img_shape=shape, ori_shape=shape)


def check_images(pipeline: Compose) -> None:
    """Let a pipeline load images by :class:`LoadCheckedImageFromFile`.

    Args:
        pipeline (Compose): The pipeline, of which a ``LoadImageFromFile`` that
            decodes by OpenCV is replaced.

    Raises:
        ValueError: If that is to skip images that are missing, or has mmcv's
            ``file_client_args`` of old.
    """
    steps = pipeline.transforms
    for i, step in enumerate(steps):
        if type(step) is LoadImageFromFile and step.imdecode_backend == 'cv2':
            if step.ignore_empty or step.file_client_args is not None:
                raise ValueError(
                    'LoadImageFromFile: expected no ignore_empty, as missing '
                    'images are raised, and backend_args in the place of '
                    f'file_client_args, got ignore_empty={step.ignore_empty}, '
                    f'file_client_args={step.file_client_args}'
                )
            steps[i] = LoadCheckedImageFromFile(
                step.to_float32,
                step.color_type,
                backend_args=step.backend_args,
            )


def _lacking(data: dict, keys: Dict[str, Sequence[str]]) -> Iterator[str]:
    """Name entries that have not all that mmdet reads, or something else."""
    for kind in ('images', 'categories'):
        if not data.get(kind):
            yield f'it has no {kind}'
    for kind, wanted in keys.items():
        entries = data.get(kind, [])
        if not isinstance(entries, list):
            yield f'its {kind} are {entries!r:.50}, expected a list'
            continue
        for entry in entries:
            if not isinstance(entry, dict):
                yield f'{kind}: {entry!r:.50} is no dict'
                continue
            name = entry.get('file_name', entry.get('id', entry))
            missing = [key for key in wanted if entry.get(key) in (None, [])]
            if missing:
                yield f'{kind}: {name} has no {" and no ".join(missing)}'
            for key in (*KEYS[kind], 'segmentation', 'iscrowd'):
                value = entry.get(key)
                if value is not None and not _is_coco(key, value):
                    yield f'{kind}: {name} has the {key} {value!r:.50}'


def _is_coco(key: str, value: Any) -> bool:
    """Whether a value is of the type that COCO's have."""
    if not isinstance(value, KINDS[key]):
        return False
    parts = value if isinstance(value, list) else []
    return all(isinstance(part, PARTS[key]) for part in parts)


def _confused(
    data: dict, classes: Sequence[str], scored: bool
) -> Iterator[str]:
    """Name what mmdet would take for something else."""
    for kind in KEYS:
        counts = Counter(entry['id'] for entry in data.get(kind, []))
        for key, count in counts.items():
            if count > 1:
                yield f'{count} {kind} have the id {key!r}'
            if kind == 'annotations' and scored and key == 0:
                yield (
                    'annotations: pycocotools counts a detection of the one '
                    'with id 0 as wrong; number them from 1'
                )
    names = [category['name'] for category in data['categories']]
    used = [name for name in names if name in classes]
    if used != list(classes):
        yield (
            f'its categories are {names}, but the classes of the config '
            f'(metainfo) {list(classes)}: mmdet numbers them in the order of '
            'the file, so each must be there once, in that order'
        )
    images = {image['id']: image for image in data['images']}
    for annotation in data.get('annotations', []):
        name, box = annotation['id'], annotation['bbox']
        if len(box) != 4:
            yield f'annotation {name!r} has a bbox of {len(box)} numbers'
        image = images.get(annotation['image_id'])
        mask = annotation.get('segmentation')
        if image and isinstance(mask, dict):
            size = [image['height'], image['width']]
            if mask.get('size') != size:
                yield (
                    f'annotation {name!r} has a mask of [height, width] '
                    f'{mask.get("size")} in an image of {size}'
                )


def _left_out(
    data: dict, classes: Sequence[str], polygons_only: bool
) -> Iterator[str]:
    """Name annotations that mmdet would train without."""
    images = {image['id']: image for image in data['images']}
    names = {c['id']: c['name'] for c in data['categories']}
    for annotation in data.get('annotations', []):
        category = annotation['category_id']
        if names.get(category, classes[0]) not in classes:
            continue  # as the config wants it
        image = images.get(annotation['image_id'])
        masks = annotation.get('segmentation') or []
        x, y, width, height = annotation['bbox']
        if category not in names:
            problem = f'is of no category of the file, {category!r}'
        elif not image:
            problem = f'is in no image of the file, {annotation["image_id"]!r}'
        elif not (width >= 1 and height >= 1 and annotation['area'] > 0):
            problem = 'is smaller than a pixel, or its area is 0'
        elif not (
            -width < x < image['width'] and -height < y < image['height']
        ):
            problem = 'is outside of the image'
        elif isinstance(masks, dict):
            if not polygons_only or annotation.get('iscrowd'):
                continue
            problem = (
                'has a mask in run-length code, which LoadAnnotations '
                'ignores with poly2mask=False'
            )
        elif any(len(polygon) < 6 or len(polygon) % 2 for polygon in masks):
            problem = 'has a polygon of less than three points (x, y)'
        else:
            continue
        where = f' ({image["file_name"]})' if image else ''
        yield (
            f'annotation {annotation["id"]!r}{where} {problem}: bbox '
            f'{annotation["bbox"]}, area {annotation["area"]}'
        )


@DATASETS.register_module()
class CheckedCocoDataset(CocoDataset):
    """mmdet's ``CocoDataset``, which raises rather than skips or misreads.

    It examines the annotation file, loads images by
    :class:`LoadCheckedImageFromFile` where the pipeline says
    ``LoadImageFromFile``, and names the image's file in whatever error its
    pipeline raises. Of images that ``filter_cfg`` leaves out it tells the log.

    Args:
        strict (bool): Whether to raise when mmdet would leave annotations out
            of training (and yet count them in testing), instead of telling
            the log. Defaults to True.
        **kwargs: mmdet's.

    Raises:
        ValueError: If the file has what mmdet fails on or mistakes or,
            with ``strict``, leaves out; or if ``filter_cfg`` leaves nothing.
    """

    def __init__(self, *args: Any, strict: bool = True, **kwargs: Any) -> None:
        self.strict = strict
        super().__init__(*args, **kwargs)

    @property
    def pipeline(self) -> Compose:
        """The transforms; mmdet's ``PipelineSwitchHook`` sets others."""
        return self._pipeline

    @pipeline.setter
    def pipeline(self, pipeline: Compose) -> None:
        check_images(pipeline)
        self._pipeline = pipeline

    def COCOAPI(self, path: str) -> COCO:
        """Examine an annotation file and read it: mmdet's own calls this."""
        with open(path) as file:
            try:
                data = json.load(file)
            except ValueError as error:
                raise ValueError(f'{self.ann_file}: {error}') from error
        if not isinstance(data, dict):
            raise ValueError(
                f'{self.ann_file} holds a {type(data).__name__}, expected '
                "COCO's annotations: a dict of images, annotations and "
                'categories'
            )
        classes = self.metainfo['classes']
        steps = [
            step
            for step in self.pipeline.transforms
            if isinstance(step, LoadAnnotations) and step.with_mask
        ]
        wanted = [*KEYS['annotations'], *(['iscrowd'] * self.test_mode)]
        wanted += ['segmentation'] * bool(steps)
        problems = list(_lacking(data, dict(KEYS, annotations=wanted)))
        problems = problems or list(_confused(data, classes, self.test_mode))
        if problems:
            raise ValueError(self._listed(problems))
        polygons_only = any(not step.poly2mask for step in steps)
        problems = list(_left_out(data, classes, polygons_only))
        if problems:
            text = self._listed(problems) + (
                '\nTraining goes without these, testing counts them as missed'
            )
            if self.strict:
                raise ValueError(f'{text}: mend them, or set strict=False')
            print_log(text, 'current', logging.WARNING)
        return COCO(path)

    def _listed(self, problems: List[str]) -> str:
        """Problems of the annotation file as one text."""
        shown = problems[:SHOWN]
        if len(problems) > SHOWN:
            shown.append(f'and {len(problems) - SHOWN} more')
        return '\n  '.join([f'{self.ann_file}:', *shown])

    def filter_data(self) -> List[dict]:
        """Filter images as mmdet does, and tell which."""
        kept = super().filter_data()
        names = {info['img_path'] for info in self.data_list}
        names -= {info['img_path'] for info in kept}
        if names:
            text = (
                f'{self.ann_file}: filter_cfg={self.filter_cfg} leaves out '
                f'{len(names)} of {len(self.data_list)} images, such as '
                f'{min(names)}'
            )
            if not kept:
                raise ValueError(text)
            print_log(text, 'current', logging.WARNING)
        return kept

    def prepare_data(self, idx: int) -> Optional[dict]:
        """Pass an image through the pipeline; an error names its file."""
        try:
            return super().prepare_data(idx)
        except Exception as error:
            path = str(self.get_data_info(idx)['img_path'])
            if path in str(error):
                raise
            raise ValueError(
                f'{path}: {type(error).__name__}: {error}'
            ) from error
