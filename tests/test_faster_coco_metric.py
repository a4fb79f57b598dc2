"""FasterCocoMetric finds the numbers that mmdet's CocoMetric finds."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.evaluation import CocoMetric
from mmdet.evaluation.metrics import coco_metric
from mmengine.config import Config
from mmengine.structures import InstanceData
from pycocotools.coco import COCO

from fasternet_det import FasterCocoMetric
from fasternet_det.datasets import nuclei

ROOT = Path(__file__).parents[1]
PIN = 'faster-coco-eval==1.8.0'
ITEMS = ['mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l'] + [
    *('AR@100', 'AR@300', 'AR@1000', 'AR_s@1000', 'AR_m@1000', 'AR_l@1000')
]


@pytest.fixture(scope='module')
def faster_coco_eval(registry, tmp_path_factory):
    """The package, in a folder of its own."""
    folder = tmp_path_factory.mktemp('faster_coco_eval')
    subprocess.run(
        [
            *(sys.executable, '-m', 'pip', '-q', 'install', '--no-deps'),
            *('--target', folder, PIN),
        ],
        check=True,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield importlib.import_module('faster_coco_eval')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('nuclei')
    nuclei.convert(str(folder))
    return folder / 'annotations'


def detect(coco, image_id, rng):
    """The truth, moved, some of it missed, and some found again and again.

    In one image, more are found than the 100 that count for AP.
    """
    anns = [a for a in coco.imgToAnns[image_id] if rng.random() < 0.9]
    anns += [a for a in anns if rng.random() < 0.2]
    anns += [a for _ in range(50) for a in anns if image_id == 1]
    masks, boxes = np.zeros((len(anns), 128, 128), bool), []
    for mask, ann in zip(masks, anns):
        shift = rng.integers(-4, 5, 2)
        mask[:] = np.roll(coco.annToMask(ann), shift, (0, 1))
        x, y, width, height = ann['bbox'] + rng.normal(0, 1.5, 4)
        boxes.append((x, y, x + width, y + height))
    return InstanceData(
        bboxes=torch.tensor(np.array(boxes).reshape(-1, 4)),
        # to two digits: some are equal
        scores=torch.tensor(rng.random(len(anns)).round(2)),
        labels=torch.zeros(len(anns), dtype=int),
        masks=torch.from_numpy(masks),
    )


def evaluate(kind, ann_file, seed, **kwargs):
    """Evaluate made-up detections, drawn from a seed."""
    metric = kind(ann_file=str(ann_file), **kwargs)
    metric.dataset_meta = dict(classes=('nucleus',))
    coco, rng = COCO(ann_file), np.random.default_rng(seed)
    for image_id, info in coco.imgs.items():
        sample = dict(
            img_id=image_id,
            ori_shape=(info['height'], info['width']),
            pred_instances=detect(coco, image_id, rng),
        )
        metric.process({}, [sample])
    return metric.evaluate(len(coco.imgs))


@pytest.mark.parametrize('split, seed', [('val', 0), ('val', 1), ('train', 2)])
def test_same_numbers(split, seed, data, faster_coco_eval, monkeypatch):
    settings = (
        dict(metric=['bbox', 'segm'], metric_items=ITEMS),
        dict(metric='bbox', classwise=True, proposal_nums=(3, 5, 300)),
        dict(metric='proposal'),
    )
    run = [(data / f'{split}.json', seed, kwargs) for kwargs in settings]
    wanted = [evaluate(CocoMetric, *args, **kw) for *args, kw in run]

    class Unwanted:
        def __init__(self, *args):
            raise AssertionError('pycocotools evaluates')

    monkeypatch.setattr(coco_metric, 'COCOeval', Unwanted)
    found = [evaluate(FasterCocoMetric, *args, **kw) for *args, kw in run]
    assert coco_metric.COCOeval is Unwanted  # put back
    assert [len(numbers) for numbers in found] == [24, 7, 6]
    for ours, mmdets in zip(found, wanted):
        assert ours == pytest.approx(mmdets, abs=0, nan_ok=True)
    assert 0.1 < found[0]['coco/bbox_mAP'] < 0.8
    assert 0.1 < found[0]['coco/segm_mAP'] < 0.8


def test_nothing_found(data, faster_coco_eval, monkeypatch):
    """As mmdet's: no numbers."""
    module = sys.modules[__name__]
    empty = InstanceData(
        bboxes=torch.zeros(0, 4),
        scores=torch.zeros(0),
        labels=torch.zeros(0, dtype=int),
    )
    monkeypatch.setattr(module, 'detect', lambda *args: empty)
    for kind in (CocoMetric, FasterCocoMetric):
        assert evaluate(kind, data / 'val.json', 0) == {}


def test_without_the_package(data, monkeypatch):
    """It says so when it is built, not after the last image."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        *(importlib.util, 'find_spec'),
        lambda name: None if name == 'faster_coco_eval' else find_spec(name),
    )
    with pytest.raises(ImportError, match=f'--no-deps {re.escape(PIN)}'):
        FasterCocoMetric(ann_file=str(data / 'val.json'))


def test_page(tmp_path):
    """It names the version, and its line changes a config's metric alone."""
    page = (ROOT / 'docs' / 'evidence.md').read_text()
    assert f'`pip install --no-deps {PIN}`' in page
    (line,) = re.findall(r'```python\n(.*FasterCocoMetric.*)\n```', page)
    base = ROOT / 'configs' / 'mini' / 'retinanet_fasternet-t0_fpn_nuclei.py'
    (tmp_path / 'my_config.py').write_text(f'_base_ = {str(base)!r}\n{line}\n')
    cfg, plain = map(Config.fromfile, (tmp_path / 'my_config.py', base))
    for key in ('val_evaluator', 'test_evaluator'):
        assert cfg[key] == dict(plain[key], type='FasterCocoMetric')
