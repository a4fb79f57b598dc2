"""The rows of "Images and annotations" in docs/hostile-input.md."""

import copy
import functools
import inspect
import io
import json
import re
import runpy
import struct
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmcv.transforms import LoadImageFromFile
from mmdet.apis import inference_detector
from mmdet.registry import DATASETS, MODELS
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.evaluator import Evaluator
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask

from fasternet_det.datasets.checked import (
    MARKER,
    LoadCheckedImageFromFile,
    check_images,
    decode,
    is_cut,
)

ROOT = Path(__file__).parents[2]
MINI = ROOT / 'configs' / 'mini'
tool = runpy.run_path(ROOT / 'tools' / 'predict.py')
HEIGHT, WIDTH = 48, 64
PIXELS = cv2.GaussianBlur(
    np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8),
    (0, 0),
    2,
)
RGB = Image.fromarray(PIXELS[..., ::-1])
LEFT_OPAQUE = Image.fromarray(
    np.uint8(255 * (np.mgrid[:HEIGHT, :WIDTH][1] < 32))
)


def encoded(image, kind, cut=1.0, orientation=None, **options):
    """The first part of a file."""
    if orientation:
        options['exif'] = Image.Exif()
        options['exif'][0x0112] = orientation
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()[: int(cut * file.tell())]


def with_alpha(mode):
    image = RGB.convert(mode[:-1])
    image.putalpha(LEFT_OPAQUE)
    return image


def of_16_bits(name, pixels):
    return cv2.imencode(name, pixels.astype(np.uint16) * 16)[1].tobytes()


def thumbnailed():
    """A JPEG in the head of a JPEG, which is cut short."""
    head = b'\xff\xe2' + (2 + len(small)).to_bytes(2, 'big') + small
    return JPEG[:2] + head + JPEG[2:-200]


JPEG = encoded(RGB, 'JPEG', quality=95)
small = encoded(RGB.resize((16, 12)), 'JPEG')

# What is read as another decoder, Pillow, reads it: files by name.
RIGHT = {
    'plain.png': encoded(RGB, 'PNG'),
    '1x1.png': encoded(RGB.crop((9, 9, 10, 10)), 'PNG'),
    'palette.png': encoded(RGB.quantize(32), 'PNG'),
    'palette.gif': encoded(RGB.quantize(32), 'GIF'),
    'palette_transparent.png': encoded(
        RGB.quantize(32), 'PNG', transparency=3
    ),
    'two_colours.png': encoded(RGB.convert('1'), 'PNG'),
    'rgba.png': encoded(with_alpha('RGBA'), 'PNG'),
    'grey_alpha.png': encoded(with_alpha('LA'), 'PNG'),
    'cmyk.jpg': encoded(RGB.convert('CMYK'), 'JPEG', quality=95),
    'cmyk.tif': encoded(RGB.convert('CMYK'), 'TIFF'),
    'grey.png': encoded(RGB.convert('L'), 'PNG'),
    'grey.jpg': encoded(RGB.convert('L'), 'JPEG'),
    'progressive.jpg': encoded(RGB, 'JPEG', progressive=True),
    'turned.jpg': encoded(RGB, 'JPEG', quality=95, orientation=6),
    'turned.png': encoded(RGB, 'PNG', orientation=6),
    'half_turned.jpg': encoded(RGB, 'JPEG', orientation=3),
    'restarts.jpg': cv2.imencode(
        *('.jpg', PIXELS, [cv2.IMWRITE_JPEG_RST_INTERVAL, 1])
    )[1].tobytes(),
    # A film, say, in which any bytes may be
    'trailer.jpg': JPEG + b'\xff\xd9 what a camera adds \xff\xda',
}
LARGE = cv2.imencode('.png', np.full((9000, 12000), 99, np.uint8))[1].tobytes()
# What must be refused: files and errors by name.
CUT = 'the JPEG file is cut short'
NO_IMAGE = 'OpenCV cannot decode it: is it a whole image'
DEEP = 'of its uint16 only 8 bits would be kept: convert it, or train with'
WRONG = {
    '16bit.png': (of_16_bits('.png', PIXELS), DEEP),
    '16bit_grey.png': (of_16_bits('.png', PIXELS[..., 1]), DEEP),
    '16bit.tif': (of_16_bits('.tif', PIXELS[..., 1]), DEEP),
    'float.tif': (
        cv2.imencode('.tif', PIXELS[..., 1].astype(np.float32))[1].tobytes(),
        NO_IMAGE,
    ),
    'truncated.jpg': (JPEG[: len(JPEG) * 3 // 4], CUT),
    'no_end.jpg': (JPEG[:-2], CUT),
    'truncated_thumbnail.jpg': (thumbnailed(), CUT),
    'truncated_progressive.jpg': (
        encoded(RGB, 'JPEG', 0.6, progressive=True),
        CUT,
    ),
    'head.jpg': (JPEG[:100], CUT),
    **{
        f'truncated.{kind}': (encoded(RGB, kind, 0.6), NO_IMAGE)
        for kind in ('png', 'bmp', 'webp', 'tiff', 'gif')
    },
    'zero_bytes.png': (b'', 'the file is empty'),
    'text.png': (b'no image', NO_IMAGE),
}


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmdet')


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def made_annotation(id=1, box=(10, 10, 20, 16), **kwargs):
    x, y, w, h = box
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    made = dict(
        id=id,
        image_id=1,
        category_id=1,
        iscrowd=0,
        bbox=list(box),
        area=w * h,
        segmentation=[polygon],
    )
    made.update(kwargs)
    return {key: value for key, value in made.items() if value is not None}


def made_data(*annotations, images=(), categories=('nucleus',), size=None):
    width, height = size or (WIDTH, HEIGHT)
    return dict(
        images=[
            dict(id=1, file_name='a.png', width=width, height=height),
            *images,
        ],
        annotations=list(annotations),
        categories=[
            dict(id=i, name=name) for i, name in enumerate(categories, 1)
        ],
    )


@functools.lru_cache(maxsize=None)
def mini(detector):
    return Config.fromfile(MINI / f'{detector}_fasternet-t0_fpn_nuclei.py')


def configured(folder, data, detector='retinanet', **dataset):
    """A mini config, with images of ``folder/images`` and annotations."""
    path = folder / 'annotations.json'
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    cfg = copy.deepcopy(mini(detector))
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        loader.dataset.update(
            data_root=f'{folder}/',
            ann_file=path.name,
            data_prefix=dict(img='images/'),
            filter_cfg=None,
            **dataset,
        )
    cfg.test_evaluator.ann_file = str(path)
    return cfg


def image_config(folder, files, scale=(128, 128)):
    """Likewise of images by name, annotated in the size they are read in."""
    data = dict(made_data(), images=[])
    for i, (name, content) in enumerate(files.items(), 1):
        path = write(folder / 'images' / name, content)
        try:
            width, height = ImageOps.exif_transpose(Image.open(path)).size
        except OSError:
            width, height = WIDTH, HEIGHT
        data['images'].append(
            dict(id=i, file_name=name, width=width, height=height)
        )
        box = (0, 0, min(20, width), min(20, height))
        data['annotations'].append(made_annotation(i, box, image_id=i))
    cfg = configured(folder, data)
    train_pipeline = cfg.train_dataloader.dataset.pipeline
    train_pipeline[2].update(scale=scale, ratio_range=(1, 1))
    cfg.test_dataloader.dataset.pipeline[1].scale = scale
    return cfg


def samples(cfg):
    """The images of the training set, and what is known of them."""
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    return [dataset[i] for i in range(len(dataset))]


def train(model, batch):
    """A step of training."""
    model = copy.deepcopy(model).train()
    batch = model.data_preprocessor(pseudo_collate(batch), True)
    loss, _ = model.parse_losses(model(**batch, mode='loss'))
    loss.backward()
    assert torch.isfinite(loss)


def score(cfg, masks=False):
    """AP of detections that are the annotations."""
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    evaluator = Evaluator(cfg.test_evaluator)
    evaluator.dataset_meta = dataset.metainfo
    annotations = json.loads(Path(cfg.test_evaluator.ann_file).read_text())
    for i in range(len(dataset)):
        sample = dataset[i]['data_samples']
        found = [
            annotation
            for annotation in annotations.get('annotations', [])
            if annotation['image_id'] == sample.img_id
        ]
        boxes = torch.tensor([a['bbox'] for a in found]).view(-1, 4).float()
        boxes[:, 2:] += boxes[:, :2]
        sample.pred_instances = InstanceData(
            bboxes=boxes,
            scores=torch.ones(len(found)),
            labels=torch.zeros(len(found), dtype=torch.int64),
        )
        if masks:
            sample.pred_instances.masks = torch.ones(
                len(found), HEIGHT, WIDTH, dtype=torch.bool
            )
            for mask, annotation in zip(sample.pred_instances.masks, found):
                x, y, w, h = annotation['bbox']
                mask[:] = False
                mask[y : y + h, x : x + w] = True
        evaluator.process([sample])
    return evaluator.evaluate(len(dataset))


@pytest.fixture(scope='module')
def retinanet(filled):
    """The mini RetinaNet with random weights and many detections."""
    cfg = copy.deepcopy(mini('retinanet'))
    init_default_scope('mmdet')
    model = MODELS.build(cfg.model)
    weights = filled({k: v.shape for k, v in model.state_dict().items()})
    for name in weights:
        if name.endswith(('_cls.weight', '_reg.weight')):
            weights[name] *= 1e-2
    model.load_state_dict(weights)
    model.dataset_meta = dict(classes=('nucleus',))
    cfg.test_dataloader.dataset.pipeline[1].scale = (128, 128)
    model.cfg = cfg
    return model.eval()


# ---- images


@pytest.mark.parametrize('name', RIGHT)
def test_images_are_read_as_by_another_decoder(name, tmp_path):
    path = write(tmp_path / name, RIGHT[name])
    image = ImageOps.exif_transpose(Image.open(path)).convert('RGB')
    (height, width), loader = image.size[::-1], LoadCheckedImageFromFile()
    results = loader(dict(img_path=path, height=height, width=width))
    assert results['ori_shape'] == results['img_shape'] == (height, width)
    assert results['img'].dtype == np.uint8
    difference = results['img'] - np.float32(image)[..., ::-1]
    assert abs(difference).max() <= 1
    stock = LoadImageFromFile()(dict(img_path=path))['img']
    assert np.array_equal(results['img'], stock)
    grey = LoadCheckedImageFromFile(color_type='grayscale', to_float32=True)
    grey = grey(dict(img_path=path))['img']
    assert grey.shape == (height, width) and grey.dtype == np.float32


def test_images_train_and_test(retinanet, tmp_path):
    cfg = image_config(tmp_path, RIGHT)
    batch = samples(cfg)
    assert len(batch) == len(RIGHT)
    assert all(len(s['data_samples'].gt_instances) == 1 for s in batch)
    train(retinanet, batch)
    assert score(cfg)['coco/bbox_mAP'] == 1


@pytest.mark.parametrize('name', WRONG)
def test_images_are_refused(name, tmp_path):
    content, error = WRONG[name]
    cfg = image_config(tmp_path, {name: content})
    path = re.escape(f'{tmp_path}/images/{name}: ') + error
    with pytest.raises(ValueError, match=path):
        samples(cfg)
    with pytest.raises(ValueError, match=path):
        score(cfg)
    with pytest.raises(ValueError, match=error):
        tool['decode'](content, cv2.IMREAD_COLOR)


def test_all_bits_are_kept_where_asked_for(tmp_path):
    path = write(tmp_path / 'a.png', WRONG['16bit.png'][0])
    loader = LoadCheckedImageFromFile(color_type='unchanged')
    pixels = loader(dict(img_path=path))['img']
    assert np.array_equal(pixels, PIXELS.astype(np.uint16) * 16)
    with pytest.raises(ValueError, match=DEEP):
        LoadCheckedImageFromFile(color_type='grayscale')(dict(img_path=path))
    path = write(tmp_path / 'b.png', RIGHT['rgba.png'])
    assert loader(dict(img_path=path))['img'].shape == (HEIGHT, WIDTH, 4)


@pytest.mark.parametrize('name', ['turned.jpg', 'turned.png'])
def test_annotations_of_unturned_images(name, tmp_path):
    """64 by 48 pixels are stored, and 48 by 64 read."""
    cfg = image_config(tmp_path, {name: RIGHT[name]})
    data = json.loads((tmp_path / 'annotations.json').read_text())
    data['images'][0].update(width=WIDTH, height=HEIGHT)
    (tmp_path / 'annotations.json').write_text(json.dumps(data))
    error = (
        f'{name}: 48x64 pixels are read, but its annotations are for 64x48. '
        'If its EXIF .* load it with color_type=.color_ignore_orientation'
    )
    for step in (samples, score):
        with pytest.raises(ValueError, match=error):
            step(cfg)
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        loader.dataset.pipeline[0].color_type = 'color_ignore_orientation'
    (sample,) = samples(cfg)
    assert sample['data_samples'].ori_shape == (HEIGHT, WIDTH)
    assert score(cfg)['coco/bbox_mAP'] == 1


@pytest.mark.parametrize(
    'size, scale, is_right',
    [
        ((1, 5000), (256, 256), False),
        ((5000, 1), (1333, 800), False),
        ((5000, 7), (256, 256), False),
        ((5000, 7), (1333, 800), True),
    ],
)
def test_long_images(size, scale, is_right, retinanet, tmp_path):
    """Of these, a side that is resized to less than half a pixel is none."""
    content = encoded(RGB.resize(size), 'PNG')
    cfg = image_config(tmp_path, {'long.png': content}, scale)
    path = tmp_path / 'images' / 'long.png'
    notes = dict.fromkeys(('mean', 'pad_size', 'to_float32', 'dtype'))
    notes.update(scale=scale, keep_ratio=True)
    if is_right:
        train(retinanet, samples(cfg))
        assert score(cfg)['coco/bbox_mAP'] == 1
        tool['prepare'](cv2.imread(str(path)), notes)
        return
    for step in (samples, score):
        with pytest.raises(ValueError, match=f'{path}: error: OpenCV.*resize'):
            step(cfg)
    with pytest.raises(ValueError, match='pixels would be resized to'):
        tool['prepare'](cv2.imread(str(path)), notes)


def test_12000x9000(tmp_path):
    cfg = image_config(tmp_path, {'large.png': LARGE})
    (sample,) = samples(cfg)
    assert sample['inputs'].shape == (3, 96, 128)
    assert (sample['inputs'] == 99).all()


def test_other_decoders_are_kept(folder):
    cfg = configured(folder, made_data(made_annotation()))
    dataset = cfg.train_dataloader.dataset
    for backend, kind in (
        ('cv2', LoadCheckedImageFromFile),
        ('pillow', LoadImageFromFile),
    ):
        dataset.pipeline[0].imdecode_backend = backend
        step = DATASETS.build(dataset).pipeline.transforms[0]
        assert type(step) is kind and step.color_type == 'color'


def test_settings_of_loaders_are_kept():
    settings = dict(
        to_float32=True,
        color_type='grayscale',
        backend_args=dict(backend='local'),
    )
    pipeline = Compose(
        [
            dict(settings, type='LoadImageFromFile'),
            dict(type='LoadImageFromNDArray'),  # reads no file
        ]
    )
    _, other = pipeline.transforms
    check_images(pipeline)
    first, second = pipeline.transforms
    assert type(first) is LoadCheckedImageFromFile and second is other
    for name, value in settings.items():
        assert getattr(first, name) == value


@pytest.mark.parametrize(
    'settings', [dict(ignore_empty=True), dict(file_client_args=dict())]
)
def test_settings_that_would_go_are_refused(settings):
    pipeline = Compose([dict(settings, type='LoadImageFromFile')])
    (name,) = settings
    with pytest.raises(ValueError, match=f'got .*{name}={settings[name]}'):
        check_images(pipeline)


def test_a_pipeline_that_is_switched_is_checked(folder):
    """As by mmdet's PipelineSwitchHook, in RTMDet's last epochs."""
    cfg = configured(folder, made_data(made_annotation()))
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    dataset.pipeline = Compose([dict(type='LoadImageFromFile')])
    (step,) = dataset.pipeline.transforms
    assert type(step) is LoadCheckedImageFromFile


def test_decompression_bombs_are_refused(tmp_path):
    """50,000x50,000 pixels, for which OpenCV has an error of its own."""
    bomb = bytearray(encoded(RGB, 'BMP'))
    bomb[18:26] = struct.pack('<ii', 50000, 50000)
    path = write(tmp_path / 'a.bmp', bomb)
    with pytest.raises(ValueError, match=f'{path}: .*PIXELS'):
        LoadCheckedImageFromFile()(dict(img_path=path))


def test_files_are_got_by_the_backend(tmp_path):
    loader = LoadCheckedImageFromFile(backend_args=dict(backend='nowhere'))
    path = write(tmp_path / 'a.png', RIGHT['plain.png'])
    with pytest.raises(KeyError, match='nowhere'):
        loader(dict(img_path=path))


def test_missing_image(tmp_path):
    cfg = configured(tmp_path, made_data(made_annotation()))
    with pytest.raises(FileNotFoundError, match='images/a.png'):
        samples(cfg)


def test_errors_of_workers_and_of_evaluate_name_the_file(tmp_path):
    cfg = image_config(tmp_path, {'a.jpg': WRONG['truncated.jpg'][0]})
    loader = dict(cfg.train_dataloader, num_workers=1, batch_size=1)
    with pytest.raises(ValueError, match='images/a.jpg: the JPEG file is cut'):
        next(iter(Runner.build_dataloader(loader, seed=0)))


# ---- annotations


def rle(shape=(HEIGHT, WIDTH), box=(10, 10, 20, 16)):
    mask = np.zeros(shape, np.uint8, order='F')
    x, y, w, h = box
    mask[y : y + h, x : x + w] = 1
    code = coco_mask.encode(mask)
    return dict(size=code['size'], counts=code['counts'].decode())


def numbered(i):
    data = made_data(made_annotation(i or 1, image_id=i, category_id=i))
    data['images'][0]['id'] = data['categories'][0]['id'] = i
    return data


SECOND = (36, 20, 16, 12)
COUNTS = [10 * 48 + 10, *[16, 32] * 19, 16, 34 * 48 + 22]
# Annotations, and how many are trained with and how many are ignored there.
ANNOTATED = {
    'no_objects': (made_data(), 0, 0),
    'no_list': (dict(made_data(), annotations=None), 0, 0),
    'partly_outside': (made_data(made_annotation(box=(54, 38, 20, 20))), 1, 0),
    'crowd': (
        made_data(
            made_annotation(),
            made_annotation(2, SECOND, iscrowd=1, segmentation=rle()),
        ),
        1,
        1,
    ),
    'crowd_only': (made_data(made_annotation(iscrowd=1)), 0, 1),
    'polygons': (made_data(made_annotation()), 1, 0),
    'rle': (made_data(made_annotation(segmentation=rle())), 1, 0),
    'rle_uncompressed': (
        made_data(
            made_annotation(
                segmentation=dict(size=[HEIGHT, WIDTH], counts=COUNTS)
            )
        ),
        1,
        0,
    ),
    'image_and_category_0': (numbered(0), 1, 0),
    'ids_2^31': (numbered(2**31 + 1), 1, 0),
    'ids_2^53': (numbered(2**53 + 1), 1, 0),
    'ids_2^63': (numbered(2**63 + 1), 1, 0),
    'other_category': (
        made_data(
            made_annotation(),
            made_annotation(2, (0, 0, 0, 0), category_id=2),
            categories=('nucleus', 'dirt'),
        ),
        1,
        0,
    ),
}
LEFT_OUT = {
    'outside': (dict(box=(64, 10, 9, 9)), 'is outside of the image'),
    'outside_left': (dict(box=(-9, 10, 9, 9)), 'is outside of the image'),
    'outside_below': (dict(box=(1, 48, 9, 9)), 'is outside of the image'),
    'outside_above': (dict(box=(1, -9, 9, 9)), 'is outside of the image'),
    'zero_width': (dict(box=(10, 10, 0, 9)), 'smaller than a pixel'),
    'narrow': (dict(box=(10, 10, 0.5, 9)), 'smaller than a pixel'),
    'zero_height': (dict(box=(10, 10, 9, 0.5)), 'smaller than a pixel'),
    'zero_area': (dict(area=0), 'or its area is 0'),
    'nan': (dict(bbox=[float('nan'), 1, 9, 9]), 'is outside of the image'),
    'unknown_image': (dict(image_id='1'), "in no image of the file, '1'"),
    'unknown_image_rle': (
        dict(image_id='1', segmentation=rle()),
        "in no image of the file, '1'",
    ),
    'unknown_category': (dict(category_id=7), 'of no category of the file, 7'),
    'two_points': (dict(segmentation=[[1, 2, 3, 4]]), 'less than three poin'),
    'odd': (dict(segmentation=[[1] * 7]), 'less than three points'),
}
# Annotations, the error, and whether training, not only testing, raises it.
REFUSED = {
    'no_area': (
        made_data(made_annotation(7, area=None)),
        'annotations: 7 has no area',
        True,
    ),
    'no_segmentation': (
        made_data(made_annotation(7, segmentation=[])),
        'annotations: 7 has no segmentation',
        True,
    ),
    'no_iscrowd': (
        made_data(made_annotation(7, iscrowd=None)),
        'annotations: 7 has no iscrowd',
        False,
    ),
    'id_0': (made_data(made_annotation(0)), 'number them from 1', False),
    'no_width': (
        made_data(images=[dict(id=2, file_name='b.png')]),
        'images: b.png has no width and no height',
        True,
    ),
    'no_images': (dict(made_data(), images=[]), 'it has no images', True),
    'no_categories': (
        dict(made_data(), categories=[]),
        'it has no categories',
        True,
    ),
    'no_id': (
        dict(made_data(), categories=[dict(name='nucleus')]),
        r"categories: \{'name': 'nucleus'\} has no id",
        True,
    ),
    'one_name': (
        made_data(categories=('nucleus', 'nucleus')),
        r"its categories are \['nucleus', 'nucleus'\], but the classes of",
        True,
    ),
    'other_name': (
        made_data(categories=('cell',)),
        r"\['cell'\], but .* \['nucleus'\]: mmdet numbers them in the order",
        True,
    ),
    'one_category_id': (
        dict(
            made_data(),
            categories=[dict(id=1, name='a'), dict(id=1, name='nucleus')],
        ),
        '2 categories have the id 1',
        True,
    ),
    'one_image_id': (
        made_data(images=[dict(id=1, file_name='b', width=1, height=1)]),
        '2 images have the id 1',
        True,
    ),
    'one_annotation_id': (
        made_data(made_annotation(), made_annotation()),
        '2 annotations have the id 1',
        True,
    ),
    'three_numbers': (
        made_data(made_annotation(bbox=[1, 2, 3])),
        'annotation 1 has a bbox of 3 numbers',
        True,
    ),
    'mask_of_other_size': (
        made_data(made_annotation(segmentation=rle((WIDTH, HEIGHT)))),
        r'a mask of \[height, width\] \[64, 48\] in an image of \[48, 64\]',
        True,
    ),
    'mask_of_no_size': (
        made_data(made_annotation(segmentation=dict(counts=COUNTS))),
        r'a mask of \[height, width\] None in an image of \[48, 64\]',
        True,
    ),
    'null': (
        dict(made_data(), annotations=None),
        'its annotations are No',
        True,
    ),
    'text': (
        dict(made_data(), categories=['nucleus']),
        "categories: 'nucleus' is no dict",
        True,
    ),
    **{
        f'{key}_{type(value).__name__}': (
            made_data(made_annotation(**{'id': 7, key: value})),
            rf'annotations: {name} has the {key} {re.escape(repr(value))}',
            True,
        )
        for key, value, name in (
            ('id', [1], r'\[1\]'),
            ('category_id', dict(id=1), 7),
            ('bbox', [1, 2, None, 4], 7),
            ('bbox', '1 2 3 4', 7),
            ('area', '9', 7),
            ('segmentation', [1, 2, 3, 4, 5, 6], 7),  # not in a list
            ('segmentation', 'none', 7),
        )
    },
    'results': ([], 'holds a list, expected COCO.s annotations', True),
    'no_json': ('{', 'Expecting property name', True),
}


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / 'images' / 'a.png', RIGHT['plain.png'])
    return tmp_path


@pytest.fixture(scope='module')
def mask_rcnn():
    cfg = mini('mask-rcnn')
    init_default_scope('mmdet')
    torch.manual_seed(0)
    return MODELS.build(cfg.model)


@pytest.mark.parametrize('name', ANNOTATED)
def test_annotations(name, folder):
    data, trained, ignored = ANNOTATED[name]
    data = {key: value for key, value in data.items() if value is not None}
    cfg = configured(folder, data, 'mask-rcnn')
    (sample,) = (s['data_samples'] for s in samples(cfg))
    assert len(sample.gt_instances) == trained
    assert len(sample.ignored_instances) == ignored
    if not trained:  # COCO's sign for nothing to find; {} of no detections
        assert score(cfg, True).get('coco/bbox_mAP', -1) == -1
        return
    masks = sample.gt_instances.masks.to_ndarray()
    x1, y1, x2, y2 = sample.gt_instances.bboxes.tensor[0].tolist()
    area = (x2 - x1) * (y2 - y1)
    assert masks[0].sum() == pytest.approx(area, rel=0.1)
    scores = score(cfg, True)
    assert scores['coco/bbox_mAP'] == scores['coco/segm_mAP'] == 1


@pytest.mark.parametrize('detector', ['retinanet', 'mask-rcnn'])
def test_annotations_train(detector, folder, request):
    batch = []
    for name in ('no_list', 'partly_outside', 'crowd', 'crowd_only', 'rle'):
        data = ANNOTATED[name][0]
        data = {key: value for key, value in data.items() if value is not None}
        cfg = configured(folder, data, detector)
        cfg.train_dataloader.dataset.pipeline[2].scale = (128, 128)
        batch += samples(cfg)
    model = request.getfixturevalue(detector.replace('-', '_'))
    train(model, batch)
    train(model, batch[:1])  # alone, without an object


@pytest.mark.parametrize('name', LEFT_OUT)
def test_annotations_that_mmdet_leaves_out(name, folder, log):
    changes, error = LEFT_OUT[name]
    cfg = configured(
        folder, made_data(made_annotation(), made_annotation(7, **changes))
    )
    path = re.escape(f'{folder}/annotations.json:\n  annotation 7')
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        with pytest.raises(ValueError, match=f'{path}.*{error}.*(\n.*)*stric'):
            DATASETS.build(loader.dataset)
    dataset = cfg.train_dataloader.dataset
    dataset.strict = False
    sample = DATASETS.build(dataset)[0]['data_samples']
    assert len(sample.gt_instances) == 1
    assert re.search(f'{path}.*{error}', '\n'.join(log()))
    # the same, without a word
    dataset.pop('strict')
    dataset.type = 'CocoDataset'
    sample = DATASETS.build(dataset)[0]['data_samples']
    assert len(sample.gt_instances) == 1


def test_boxes_need_no_masks(folder):
    cfg = configured(folder, made_data(made_annotation(segmentation=None)))
    dataset = cfg.train_dataloader.dataset
    dataset.pipeline[1].with_mask = False
    assert len(DATASETS.build(dataset)[0]['data_samples'].gt_instances) == 1


def test_run_lengths_where_polygons_are_wanted(folder):
    data, *_ = ANNOTATED['crowd']
    cfg = configured(folder, data, 'mask-rcnn')
    dataset = cfg.train_dataloader.dataset
    dataset.pipeline[1].poly2mask = False
    assert len(DATASETS.build(dataset)[0]['data_samples'].gt_instances) == 1
    cfg = configured(folder, ANNOTATED['rle'][0], 'mask-rcnn')
    dataset = cfg.train_dataloader.dataset
    dataset.pipeline[1].poly2mask = False
    with pytest.raises(ValueError, match='run-length code, which LoadAnnotat'):
        DATASETS.build(dataset)
    dataset.type = 'CocoDataset'  # in which no object is left
    assert not len(DATASETS.build(dataset)[0]['data_samples'].gt_instances)


@pytest.mark.parametrize('name', REFUSED)
def test_annotations_are_refused(name, folder):
    data, error, in_training = REFUSED[name]
    cfg = configured(folder, data)
    error = f'(?s){folder}/annotations.json.*{error}'
    with pytest.raises(ValueError, match=error):
        DATASETS.build(cfg.test_dataloader.dataset)
    if in_training:
        with pytest.raises(ValueError, match=error):
            DATASETS.build(cfg.train_dataloader.dataset)
    else:
        DATASETS.build(cfg.train_dataloader.dataset)[0]


@pytest.mark.parametrize('name, ap', [('id_0', 0), ('zero_width', 0.505)])
def test_what_mmdet_scores_instead(name, ap, folder):
    """Detections that are the annotations."""
    data = (
        REFUSED[name][0]
        if name in REFUSED
        else made_data(
            made_annotation(), made_annotation(2, **LEFT_OUT[name][0])
        )
    )
    cfg = configured(folder, data)
    cfg.test_dataloader.dataset.type = 'CocoDataset'
    assert score(cfg)['coco/bbox_mAP'] == ap


def test_only_categories_of_the_config_count(folder):
    cfg = configured(
        folder,
        made_data(made_annotation(), categories=('b', 'a')),
        metainfo=dict(classes=('a', 'b')),
    )
    dataset = cfg.train_dataloader.dataset
    with pytest.raises(ValueError, match=r"\['b', 'a'\], but .*\['a', 'b'\]"):
        DATASETS.build(dataset)
    # an object of category b gets the label of a
    stock = DATASETS.build(dict(dataset, type='CocoDataset'))
    assert stock.get_data_info(0)['instances'][0]['bbox_label'] == 0
    dataset.metainfo.classes = ('b', 'a')
    DATASETS.build(dataset)


def test_long_lists_are_cut(folder):
    data = made_data(*(made_annotation(i, area=None) for i in range(1, 31)))
    cfg = configured(folder, data)
    with pytest.raises(ValueError) as raised:
        DATASETS.build(cfg.train_dataloader.dataset)
    first, *lines, last = str(raised.value).splitlines()
    assert lines[9] == '  annotations: 10 has no area' and len(lines) == 10
    assert last == '  and 20 more'
    data['annotations'] = data['annotations'][:10]
    cfg = configured(folder, data)
    with pytest.raises(ValueError) as raised:
        DATASETS.build(cfg.train_dataloader.dataset)
    assert str(raised.value).splitlines() == [first, *lines]


def test_filtered_images_are_told(folder, log):
    empty = dict(id=2, file_name='b.png', width=64, height=64)
    tiny = dict(id=3, file_name='c.png', width=64, height=7)
    data = made_data(made_annotation(), images=[empty, tiny])
    cfg = configured(folder, data)
    dataset = cfg.train_dataloader.dataset
    dataset.filter_cfg = dict(filter_empty_gt=True, min_size=32)
    assert len(DATASETS.build(dataset)) == 1
    (told,) = (text for text in log() if 'filter_cfg' in text)
    assert 'leaves out 2 of 3 images' in told and 'images/b.png' in told
    dataset.filter_cfg = dict(min_size=99)
    with pytest.raises(ValueError, match='leaves out 3 of 3 images'):
        DATASETS.build(dataset)


# ---- the fast form, exports and tools/predict.py


@pytest.fixture(scope='module')
def forms(retinanet, tmp_path_factory):
    """The fast form, the exported file and what it takes of predict.py."""
    from fasternet_det.deploy import optimize
    from fasternet_det.deploy.export import export
    from fasternet_det.deploy.metadata import describe

    path = tmp_path_factory.mktemp('exported') / 'a.onnx'
    export(retinanet, path, describe(retinanet.cfg, ('nucleus',)))
    predict, _, flag = tool['load_exported'](path)
    assert flag == cv2.IMREAD_COLOR
    return optimize(retinanet), predict, path


def same(boxes, scores, expected):
    """Whether the ten best detections are found, in whatever order."""
    assert len(expected) >= 10
    for box, score in zip(expected.bboxes[:10], expected.scores[:10]):
        apart = np.abs(np.asarray(boxes) - box.numpy()).max(1)
        apart += np.abs(np.asarray(scores) - float(score)) * 100
        assert apart.min() < 0.05


@pytest.mark.deploy
@pytest.mark.parametrize('name', [*RIGHT, '12000x9000.png'])
def test_forms(name, retinanet, forms, tmp_path):
    path = write(tmp_path / name, RIGHT.get(name, LARGE))
    fast, predict, _ = forms
    expected = inference_detector(retinanet, str(path)).pred_instances
    found = inference_detector(fast, str(path)).pred_instances
    same(found.bboxes, found.scores, expected)
    found = predict(path)
    same(found.boxes, found.scores, expected)


@pytest.mark.deploy
def test_predict_names_what_fails(retinanet, forms, tmp_path, monkeypatch):
    images = tmp_path / 'images'
    for name in ('palette.gif', 'plain.png', 'turned.jpg'):
        write(images / name, RIGHT[name])
    for name in ('truncated.jpg', '16bit.png', 'text.png', 'zero_bytes.png'):
        write(images / name, WRONG[name][0])
    write(images / 'long.png', encoded(RGB.resize((5000, 1)), 'PNG'))
    checkpoint = tmp_path / 'a.pth'
    torch.save(
        dict(
            state_dict=retinanet.state_dict(),
            meta=dict(dataset_meta=retinanet.dataset_meta),
        ),
        checkpoint,
    )
    config = tmp_path / 'config.py'
    retinanet.cfg.dump(config)
    for i, model in enumerate(
        [(forms[2],), (config, '--checkpoint', checkpoint)]
    ):
        out = tmp_path / f'out{i}'
        args = ['predict.py', *model, images, '--out', out]
        monkeypatch.setattr(sys, 'argv', [str(arg) for arg in args])
        with pytest.raises(SystemExit) as raised:
            tool['main']()
        first, deep, long, text, cut, empty = str(raised.value).splitlines()
        assert first == '5 images failed:'
        assert deep.startswith(f'  {images}/16bit.png: {DEEP}')
        assert long.startswith(f'  {images}/long.png: ')
        assert text.startswith(f'  {images}/text.png: {NO_IMAGE}')
        assert cut == f'  {images}/truncated.jpg: {CUT}'
        assert empty == f'  {images}/zero_bytes.png: the file is empty'
        found = json.loads((out / 'results.json').read_text())
        names = {result['file_name'] for result in found}
        assert names == {'palette.gif', 'plain.png', 'turned.jpg'}
        assert {p.name for p in out.iterdir()} == names | {'results.json'}
        assert cv2.imread(str(out / 'turned.jpg')).shape == (64, 48, 3)


@pytest.mark.deploy
def test_evaluate_names_what_fails(retinanet, tmp_path):
    from fasternet_det.deploy.evaluate import evaluate

    cfg = image_config(tmp_path, {'a.jpg': WRONG['truncated.jpg'][0]})
    with pytest.raises(ValueError, match='images/a.jpg: the JPEG file is cut'):
        evaluate(cfg, retinanet)


@pytest.mark.deploy
@pytest.mark.parametrize(
    'color_type, turned',
    [('color', True), ('color_ignore_orientation', False)],
)
def test_exports_keep_orientation_and_order(color_type, turned, tmp_path):
    from fasternet_det.deploy.metadata import describe

    cfg = copy.deepcopy(mini('retinanet'))
    for kind in ('LoadImageFromFile', 'LoadCheckedImageFromFile'):
        cfg.test_dataloader.dataset.pipeline[0].update(
            type=kind, color_type=color_type
        )
        notes = describe(cfg)
        assert notes['color_type'] == color_type
        assert notes['channels'] == 'RGB'
    flag = tool['FLAGS'][color_type]
    shape = tool['decode'](RIGHT['turned.jpg'], flag).shape
    assert (shape == (64, 48, 3)) == turned


def test_the_tools_decode_is_the_packages():
    for function in (is_cut, decode):
        alone = tool[function.__name__]
        assert inspect.getsource(alone) == inspect.getsource(function)
    assert tool['MARKER'] == MARKER
