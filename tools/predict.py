"""Find objects in images, by an exported file or by a config and its weights.

An .onnx or .xml that tools/export.py wrote tells by itself how it wants its
images. It needs NumPy, OpenCV and its runtime, ONNX Runtime or OpenVINO, and
nothing else: this file and the model may be taken to another machine.

Writes to --out: the images with what was found drawn in, by name, and
results.json, COCO's list of results, of all detections.
"""

import argparse
import json
import math
import pickle
import re
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Tuple

import cv2
import numpy as np

SUFFIXES = (
    *('.bmp', '.gif', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp'),
)
# Those of a JPEG file, but for 00 and D0 to D7, which stand within its scans.
MARKER = re.compile(rb'\xff+([^\x00\x01\xd0-\xd7\xff])', re.DOTALL)
FLAGS = dict(
    color=cv2.IMREAD_COLOR,
    grayscale=cv2.IMREAD_GRAYSCALE,
    unchanged=cv2.IMREAD_UNCHANGED,
    color_ignore_orientation=cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION,
    grayscale_ignore_orientation=cv2.IMREAD_IGNORE_ORIENTATION,
)


class Found(NamedTuple):
    """What is in an image, best first.

    Args:
        boxes (ndarray): Corners in pixels of the image, shape (n, 4).
        scores (ndarray): Shape (n,).
        labels (ndarray): Indices of classes, shape (n,).
        masks (list[ndarray]): Shape (H, W), bool; none without masks.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: List[np.ndarray]


Predict = Callable[[Path], Found]


# ---- images


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


# ---- exported files


def open_onnx(path: str) -> Tuple[Callable, Dict[str, str]]:
    """Open an .onnx file: its session, and its metadata in JSON."""
    import onnxruntime

    session = onnxruntime.InferenceSession(
        path, providers=['CPUExecutionProvider']
    )
    return (
        lambda images: session.run(None, {'input': images}),
        session.get_modelmeta().custom_metadata_map,
    )


def open_openvino(path: str) -> Tuple[Callable, Dict[str, str]]:
    """Open an .xml file: its session, and its metadata in JSON."""
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    compiled = core.compile_model(
        model, 'CPU', dict(INFERENCE_PRECISION_HINT='f32')
    )
    keys = ['model_info']
    notes = model.get_rt_info(keys).value if model.has_rt_info(keys) else {}
    return lambda images: list(compiled(images).values()), notes


def pad(image: np.ndarray, height: int, width: int, value: Any) -> np.ndarray:
    """Pad an image (H, W, C) at the bottom and at the right."""
    padded = np.empty((height, width, image.shape[2]), image.dtype)
    padded[:] = value
    padded[: image.shape[0], : image.shape[1]] = image
    return padded


def prepare(
    image: np.ndarray, notes: Dict[str, Any]
) -> Tuple[np.ndarray, Tuple[float, float], Tuple[int, int]]:
    """Make an image what a graph takes, to the pixel as mmdet does.

    Args:
        image (ndarray): As read, of shape (H, W) or (H, W, C).
        notes (dict): The file's metadata; see docs/export.md.

    Returns:
        tuple: The input, of shape (1, C, H', W'); the factors by which width
        and height were resized; and the width and the height that boxes are
        clipped to, those without the last padding.
    """
    if notes['to_float32']:
        image = image.astype(np.float32)
    height, width = image.shape[:2]
    factors = (1.0, 1.0)
    if notes['scale']:
        size = notes['scale']
        if notes['keep_ratio']:
            factor = min(
                max(size) / max(height, width), min(size) / min(height, width)
            )
            size = int(width * factor + 0.5), int(height * factor + 0.5)
            if not min(size):
                raise ValueError(
                    f'{width}x{height} pixels would be resized to '
                    f'{size[0]}x{size[1]}'
                )
        image = cv2.resize(image, size)
        factors = (size[0] / width, size[1] / height)
    image = image.reshape(*image.shape[:2], -1)
    if notes['pad_size']:
        width, height = notes['pad_size']
        image = pad(image, height, width, notes['pad_pixel'])
    height, width = image.shape[:2]
    if notes['dtype'] == 'float32':
        image = image.astype(np.float32)
        if notes['channels'] == 'RGB':
            image = image[..., ::-1]
        if notes['mean']:
            mean, std = np.float32(notes['mean']), np.float32(notes['std'])
            image = (image - mean) / std
        divisor = notes['pad_divisor']
        image = pad(
            image,
            height + -height % divisor,
            width + -width % divisor,
            notes['pad_value'],
        )
    images = np.ascontiguousarray(image.transpose(2, 0, 1)[None])
    return images, factors, (width, height)


def spread(mask: np.ndarray, box: np.ndarray, shape: Tuple) -> np.ndarray:
    """Spread the mask of a box (h, w) over an image (H, W), bilinearly."""
    weights = []
    for axis, count in zip((1, 0), mask.shape):  # rows, columns
        low, high = box[axis], box[axis + 2]
        pixels = np.arange(shape[1 - axis], dtype=np.float32) + 0.5
        # where pixels lie among the mask's cells, of which two share each
        cells = (pixels - low) / (high - low) * count - 0.5
        apart = np.abs(cells[:, None] - np.arange(count, dtype=np.float32))
        weights.append(np.maximum(1 - apart, 0))
    rows, columns = weights
    return rows @ mask @ columns.T


def unpad(
    logits: np.ndarray, size: Tuple, factors: Tuple, shape: Tuple
) -> np.ndarray:
    """Probabilities over an image (H, W) of logits (h, w) over an input.

    As in mmdet's RTMDetInsHead, rows are resized by the width's factor.
    """
    logits = cv2.resize(logits, size[::-1])
    height, width = (math.ceil(a * (1 / b)) for a, b in zip(size, factors))
    logits = cv2.resize(logits, (width, height))[: shape[0], : shape[1]]
    return 1 / (1 + np.exp(-logits))


def load_exported(path: Path) -> Tuple[Predict, List[str], int]:
    """Load an exported file: what finds objects, classes, how it reads."""
    open_file = open_onnx if path.suffix == '.onnx' else open_openvino
    try:
        session, notes = open_file(str(path))
    except Exception as error:  # of the runtimes, some are nothing else
        raise ValueError(f'cannot open {path}: {error}') from error
    notes = {key: json.loads(value) for key, value in notes.items()}
    if 'scale' not in notes:
        raise ValueError(
            f'{path} does not say how its images are prepared: '
            'tools/export.py writes that, of test pipelines that only load, '
            'resize and pad'
        )
    flag = FLAGS[notes['color_type']]

    def predict(image_path: Path) -> Found:
        image = decode(image_path.read_bytes(), flag)
        images, factors, size = prepare(image, notes)
        try:
            outputs = session(images)
        except Exception as error:  # of the runtimes, some are nothing else
            raise ValueError(f'the model takes another: {error}') from error
        dets, labels, *masks = (output[0] for output in outputs)
        real = labels >= 0
        boxes = dets[real, :4]
        if notes.get('clip_border', True):  # older files do not say
            boxes = np.minimum(boxes, np.float32(size * 2))
        boxes /= np.float32(factors * 2)
        shape = image.shape[:2]
        if notes['mask_grid'] == 'image':
            masks = (
                unpad(mask, images.shape[2:], factors, shape)
                for mask in masks[0][real]
            )
        elif masks:
            masks = (
                spread(mask, box, shape)
                for mask, box in zip(masks[0][real], boxes)
            )
        # one by one: of a large image, each takes much memory
        masks = [mask >= notes['mask_threshold'] for mask in masks]
        return Found(boxes, dets[real, 4], labels[real], masks)

    return predict, notes['classes'], flag


# ---- a config and its weights


def load_mmdet(
    config: Path, checkpoint: str
) -> Tuple[Predict, List[str], int]:
    """Load a detector of mmdet, likewise."""
    from mmdet.apis import inference_detector, init_detector
    from mmdet.utils import get_test_pipeline_cfg
    from mmengine.dataset import Compose

    # from now on mmengine reads safely
    from fasternet_det.datasets.checked import check_images

    model = init_detector(str(config), checkpoint, device='cpu')
    pipeline = Compose(get_test_pipeline_cfg(model.cfg))
    check_images(pipeline)
    flag = FLAGS[getattr(pipeline.transforms[0], 'color_type', 'color')]

    def predict(image_path: Path) -> Found:
        sample = inference_detector(model, str(image_path), pipeline)
        found = sample.pred_instances
        return Found(
            found.bboxes.numpy(),
            found.scores.numpy(),
            found.labels.numpy(),
            list(found.masks.numpy()) if 'masks' in found else [],
        )

    return predict, model.dataset_meta['classes'], flag


# ---- what is written


def run_lengths(mask: np.ndarray) -> Dict[str, List[int]]:
    """COCO's code of a mask (H, W): lengths of 0s and 1s, by columns."""
    flat = mask.ravel(order='F').astype(np.int8)
    changes = np.flatnonzero(np.diff(flat, prepend=0))
    counts = np.diff(changes, prepend=0, append=flat.size)
    return dict(size=list(mask.shape), counts=counts.tolist())


def results(
    found: Found, image_id: int, name: str, classes: List[str]
) -> Iterator[Dict[str, Any]]:
    """Detections of an image as COCO's results, numbered from 0."""
    for i, (box, score, label) in enumerate(
        zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist())
    ):
        left, top, right, bottom = box
        result = dict(
            image_id=image_id,
            file_name=name,
            category_id=label,
            category=classes[label] if classes else str(label),
            bbox=[left, top, right - left, bottom - top],
            score=score,
        )
        if found.masks:
            result['segmentation'] = run_lengths(found.masks[i])
        yield result


def draw(
    image: np.ndarray, found: Found, classes: List[str], threshold: float
) -> None:
    """Draw detections of at least a score into an image (H, W, 3), BGR."""
    for i in np.flatnonzero(found.scores >= threshold)[::-1]:
        label = int(found.labels[i])
        hue = np.uint8([[[label * 67 % 180, 200, 255]]])
        color = cv2.cvtColor(hue, cv2.COLOR_HSV2BGR)[0, 0]
        if found.masks:
            inside = found.masks[i]
            image[inside] = image[inside] // 2 + color // 2
        left, top, right, bottom = found.boxes[i].round().astype(int).tolist()
        color = color.tolist()
        cv2.rectangle(image, (left, top), (right, bottom), color)
        name = classes[label] if classes else label
        text = f'{name} {found.scores[i]:.2f}'
        place = (left, max(top - 3, 10))
        cv2.putText(image, text, place, cv2.FONT_HERSHEY_PLAIN, 0.8, color)


def find_images(paths: List[Path]) -> Dict[str, Path]:
    """Image files by the name of their picture, those of folders too."""
    found = {}
    for path in paths:
        inside = sorted(
            file
            for file in (path.iterdir() if path.is_dir() else [path])
            if file.suffix.lower() in SUFFIXES
        )
        if not inside:
            raise ValueError(f'{path} is no image, nor a folder of images')
        for file in inside:
            if not file.is_file():
                raise FileNotFoundError(f'there is no file {file}')
            if file.name in found:
                raise ValueError(f'two images are called {file.name}')
            found[file.name] = file
    return found


def track(items: List[Any]) -> Iterator[Any]:
    """Yield items, with a bar that shows how many are done."""
    for done in range(len(items) + 1):
        bar = '#' * (30 * done // len(items))
        print(f'\r[{bar:<30}] {done}/{len(items)}', end='', file=sys.stderr)
        if done < len(items):
            yield items[done]
    print(file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('model', type=Path, help='.onnx, .xml or config (.py)')
    parser.add_argument(
        'images', type=Path, nargs='+', help='image files, folders of them'
    )
    parser.add_argument('--checkpoint', help="a config's weights: path or URL")
    parser.add_argument(
        '--out', type=Path, default=Path('predictions'), help='new folder'
    )
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        help='least score of what is drawn (default: 0.3)',
    )
    args = parser.parse_args()
    if (args.model.suffix == '.py') != bool(args.checkpoint):
        parser.error('a config needs --checkpoint, other models take none')
    if args.model.suffix not in ('.py', '.onnx', '.xml'):
        parser.error(f'{args.model} is no .onnx, .xml or config (.py)')
    try:
        images = find_images(args.images)
        if args.out.exists():
            raise FileExistsError(f'{args.out} exists: name another by --out')
        if not args.model.is_file():
            raise FileNotFoundError(f'there is no file {args.model}')
        predict, classes, flag = (
            load_mmdet(args.model, args.checkpoint)
            if args.checkpoint
            else load_exported(args.model)
        )
    except (OSError, ValueError, EOFError, pickle.UnpicklingError) as error:
        sys.exit(f'Nothing was written: {error}')
    args.out.mkdir(parents=True)
    found, failed = [], []
    # pictures are turned by their EXIF orientation where images are
    as_drawn = flag & cv2.IMREAD_IGNORE_ORIENTATION | cv2.IMREAD_COLOR
    for i, (name, path) in enumerate(track(list(images.items()))):
        try:
            detections = predict(path)
        except (OSError, ValueError, cv2.error) as error:
            text = str(error).strip()
            failed.append(text if str(path) in text else f'{path}: {text}')
            continue
        found += results(detections, i, name, classes)
        picture = cv2.imread(str(path), as_drawn)
        draw(picture, detections, classes, args.score_thr)
        if not cv2.imwrite(str(args.out / name), picture):
            failed.append(f'{path}: its picture could not be written')
    (args.out / 'results.json').write_text(json.dumps(found))
    done = len(images) - len(failed)
    print(f'{len(found)} detections in {done} images: {args.out}')
    if failed:
        sys.exit('\n  '.join([f'{len(failed)} images failed:', *failed]))


if __name__ == '__main__':
    main()
