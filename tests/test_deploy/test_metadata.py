import copy
import re
from pathlib import Path

import pytest
from mmengine.config import Config, ConfigDict
from mmengine.utils import get_installed_path

import fasternet_det
from fasternet_det.deploy.metadata import describe

ROOT = Path(__file__).parents[2]
MMDET = Path(get_installed_path('mmdet'), '.mim', 'configs')
COCO = dict(
    fasternet_det=fasternet_det.__version__,
    classes=None,
    color_type='color',
    to_float32=False,
    scale=(1333, 800),
    keep_ratio=True,
    pad_size=None,
    pad_pixel=0,
    dtype='float32',
    layout='NCHW',
    channels='RGB',
    mean=[123.675, 116.28, 103.53],
    std=[58.395, 57.12, 57.375],
    pad_divisor=32,
    pad_value=0,
    mask_threshold=None,
    mask_grid=None,
    clip_border=True,
)
READING = ('color_type', 'to_float32', 'scale', 'keep_ratio') + (
    *('pad_size', 'pad_pixel'),
)


@pytest.fixture(scope='module')
def coco():
    return Config.fromfile(
        ROOT / 'configs/fasternet/retinanet_fasternet-t0_fpn_1x_coco.py'
    )


@pytest.fixture
def config(coco):
    return copy.deepcopy(coco)


@pytest.mark.parametrize(
    'name, expected',
    [
        (
            'fasternet/mask-rcnn_fasternet-t0_fpn_1x_coco.py',
            dict(mask_threshold=0.5, mask_grid='box'),
        ),
        (
            'fasternet/rtmdet_fasternet-t0_8xb32-300e_coco.py',
            dict(
                scale=(640, 640),
                pad_size=(640, 640),
                pad_pixel=(114, 114, 114),
            ),
        ),
        (
            'mini/retinanet_fasternet-t0_fpn_nuclei-16bit.py',
            dict(
                channels=None,
                mean=[518.0],
                std=[381.0],
                scale=(256, 256),
                color_type='unchanged',
                to_float32=True,
            ),
        ),
    ],
)
def test_of_configs(name, expected):
    config = Config.fromfile(ROOT / 'configs' / name)
    assert describe(config) == COCO | expected


def test_of_a_config(config):
    assert describe(config) == COCO


def test_of_pixels(config):
    """The graph swaps channels, normalises and pads."""
    assert describe(config, ('a', 'b'), pixels=True) == COCO | dict(
        classes=('a', 'b'),
        dtype='uint8',
        channels='BGR',
        mean=None,
        std=None,
        pad_divisor=1,
    )


def test_of_masks_over_images(config):
    config.model.test_cfg.mask_thr_binary = 0.4  # as of RTMDet-Ins
    found = describe(config)
    assert (found['mask_threshold'], found['mask_grid']) == (0.4, 'image')


@pytest.mark.parametrize(
    'path, change, expected',
    [
        ('yolox/yolox_s_8xb8-300e_coco.py', {}, False),
        ('retinanet/retinanet_r50_fpn_1x_coco.py', {}, True),
        ('rpn/rpn_r50_fpn_1x_coco.py', {}, True),
        (
            'rpn/rpn_r50_fpn_1x_coco.py',
            {'rpn_head.bbox_coder.clip_border': False},
            False,
        ),
        ('solo/solo_r50_fpn_1x_coco.py', {}, True),
        (
            'retinanet/retinanet_r50_fpn_1x_coco.py',
            {'bbox_head.bbox_coder.clip_border': False},
            False,
        ),
        (
            'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py',
            {'roi_head.bbox_head.2.bbox_coder.clip_border': False},
            False,
        ),
        (
            'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
            {'rpn_head.bbox_coder.clip_border': False},
            True,
        ),
    ],
)
def test_of_boxes_beyond_the_image(path, change, expected):
    config = Config.fromfile(MMDET / path)
    config.merge_from_dict({f'model.{k}': v for k, v in change.items()})
    assert describe(config)['clip_border'] is expected


def pipeline(config, *steps):
    steps = [ConfigDict(step) for step in steps]
    config.test_dataloader.dataset.pipeline[1:2] = steps


@pytest.mark.parametrize(
    'steps, expected',
    [
        ([], dict(scale=None, keep_ratio=False)),
        (  # what mmengine makes of a base of mmdet's, seen from elsewhere
            [dict(type='Resize', scale=96, _scope_='mmdet')],
            dict(scale=(96, 96)),
        ),
        (
            [
                dict(type='mmdet.Resize', scale=(96, 96), keep_ratio=True),
                dict(type='Pad', pad_to_square=True, pad_val=dict(img=7)),
            ],
            dict(scale=(96, 96), pad_size=(96, 96), pad_pixel=7),
        ),
    ],
)
def test_of_pipelines(steps, expected, config):
    pipeline(config, *steps)
    found = describe(config)
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    'steps',
    [
        [dict(type='RandomFlip')],
        [dict(type='Resize', scale_factor=0.5)],
        [
            dict(type='Resize', scale=(96, 64), keep_ratio=True),
            dict(type='Pad', pad_to_square=True),
        ],
        [  # the other way round
            dict(type='Pad', size=(96, 96)),
            dict(type='Resize', scale=(64, 64)),
        ],
        [dict(type='Resize', scale=(96, 96))] * 2,
    ],
)
def test_what_cannot_be_told_is_missing(steps, config):
    pipeline(config, *steps)
    found = describe(config)
    assert not found.keys() & set(READING)
    assert found['mean'] == COCO['mean'] and found['pad_divisor'] == 32
    assert found['channels'] == 'RGB'


def test_channels_that_are_unchanged_and_swapped(config):
    """Of three in a file of 16 bits, in OpenCV's order, the first is last."""
    load = config.test_dataloader.dataset.pipeline[0]
    load.color_type = 'unchanged'
    assert describe(config)['channels'] == 'RGB'
    assert describe(config, pixels=True)['channels'] == 'BGR'
    config.model.data_preprocessor.bgr_to_rgb = False
    assert describe(config)['channels'] is None


def test_pixels_of_other_than_8_bits():
    name = 'configs/mini/retinanet_fasternet-t0_fpn_nuclei-16bit.py'
    with pytest.raises(ValueError, match='only images of 8 bits .*float32=Tr'):
        describe(Config.fromfile(ROOT / name), pixels=True)


def test_all_keys_are_documented(config):
    page = (ROOT / 'docs' / 'export.md').read_text()
    cells = re.findall(r'^\| (`.*?) \|', page, re.M)
    assert set(re.findall(r'`(\w+)`', ' '.join(cells))) == set(COCO)
