from pathlib import Path

import cv2
import numpy as np
import pytest
from mmdet.registry import DATASETS
from mmengine.config import Config
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fasternet_det.datasets import nuclei


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp('nuclei')
    nuclei.convert(str(path))
    return path


@pytest.fixture(scope='module', params=['train', 'val'])
def split(request, root):
    coco = COCO(root / 'annotations' / f'{request.param}.json')
    return request.param, coco


def read(name):
    return cv2.imread(str(nuclei.SOURCE / name), cv2.IMREAD_UNCHANGED)


def test_source():
    image, labels = read('image.png'), read('mask.png')
    assert image.shape == labels.shape == (512, 512)
    assert (image.dtype, labels.dtype) == (np.uint8, np.uint16)
    assert len(np.unique(labels)) - 1 == 125
    inside, outside = image[labels > 0].mean(), image[labels == 0].mean()
    assert inside > 2 * outside  # the mask lies on the nuclei


def test_counts(split):
    name, coco = split
    tiles, nuclei_count = dict(train=(35, 295), val=(4, 27))[name]
    assert len(coco.imgs) == tiles
    assert len(coco.anns) == nuclei_count
    assert 0 not in coco.anns  # COCOeval takes id 0 for no match


def test_annotations_agree_with_pycocotools(split):
    labels = read('mask.png')
    name, coco = split
    for ann in coco.anns.values():
        mask = coco.annToMask(ann)
        ys, xs = mask.nonzero()
        width, height = xs.max() - xs.min() + 1, ys.max() - ys.min() + 1
        assert ann['bbox'] == [xs.min(), ys.min(), width, height]
        assert ann['area'] == mask.sum()
        assert (ann['category_id'], ann['iscrowd']) == (1, 0)
        file_name = coco.imgs[ann['image_id']]['file_name']
        x, y = int(file_name[1:4]), int(file_name[6:9])
        tile = labels[y : y + 128, x : x + 128]
        (label,) = np.unique(tile[mask > 0])
        assert np.array_equal(mask, tile == label)
        assert ann['area'] >= 0.4 * (labels == label).sum()


def test_dropped_nuclei_are_those_cut_too_far(split):
    labels = read('mask.png')
    name, coco = split
    for image in coco.imgs.values():
        x, y = int(image['file_name'][1:4]), int(image['file_name'][6:9])
        tile = labels[y : y + 128, x : x + 128]
        kept = [
            label
            for label in set(np.unique(tile)) - {0}
            if (tile == label).sum() / (labels == label).sum() >= 0.4
        ]
        assert len(coco.getAnnIds(imgIds=image['id'])) == len(kept)


def test_splits_cover_the_image_and_share_nothing(root):
    image, seen = read('image.png'), {}
    for name in ('train', 'val'):
        seen[name] = np.zeros((512, 512), bool)
        for path in (root / name).iterdir():
            x, y = int(path.stem[1:4]), int(path.stem[6:9])
            tile = np.s_[y : y + 128, x : x + 128]
            pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            assert np.array_equal(pixels, image[tile])
            seen[name][tile] = True
    assert np.array_equal(seen['train'], ~seen['val'])
    assert seen['val'][:, 384:].all() and not seen['val'][:, :384].any()


@pytest.mark.parametrize('name', ['train', 'val'])
def test_classes_of_pixels(name, root):
    labels = read('mask.png')
    images = {path.name for path in (root / name).iterdir()}
    masks = list((root / 'annotations' / name).iterdir())
    assert {path.name for path in masks} == images
    for path in masks:
        x, y = int(path.stem[1:4]), int(path.stem[6:9])
        mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert mask.dtype == np.uint8
        assert np.array_equal(mask, labels[y : y + 128, x : x + 128] > 0)


def test_truth_scores_one(split):
    _, coco = split
    results = coco.loadRes([dict(a, score=1.0) for a in coco.anns.values()])
    for kind in ('bbox', 'segm'):
        evaluation = COCOeval(coco, results, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert evaluation.stats[0] == pytest.approx(1)


def test_mmdet_reads_it(root):
    cfg = Config.fromfile(
        Path(__file__).parents[2] / 'configs' / 'mini' / 'nuclei.py'
    )
    for dataloader in (cfg.train_dataloader, cfg.val_dataloader):
        dataloader.dataset.data_root = str(root)
        dataset = DATASETS.build(dataloader.dataset)
        data = dataset[0]
        truth = data['data_samples'].gt_instances
        areas = truth.masks.areas
        assert len(truth) > 0 and (areas > 0).all()
        assert data['inputs'].shape[0] == 3


@pytest.mark.parametrize('kind', nuclei.KINDS)
def test_kinds_differ_in_their_pixels_alone(kind, root, tmp_path):
    nuclei.convert(str(tmp_path), kind)
    for split in ('train', 'val'):
        truth = f'annotations/{split}.json'
        assert (tmp_path / truth).read_text() == (root / truth).read_text()
        for path in (tmp_path / split).iterdir():
            tile = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            grey = cv2.imread(str(root / split / path.name), 0)
            if kind == '16bit':
                assert tile.dtype == np.uint16
                assert np.array_equal(tile, 16 * grey.astype(int))
            elif kind == '4channel':
                assert tile.shape == (128, 128, 4)
                assert np.array_equal(tile[..., 0], grey)
                # the more blurred, the less varied
                spread = tile.astype(float).std((0, 1))
                assert (np.diff(spread) < 0).all()
            else:
                assert np.array_equal(tile, grey)


def test_unknown_kind(tmp_path):
    with pytest.raises(ValueError, match="'32bit' is not one of grey, 16bit"):
        nuclei.convert(str(tmp_path), '32bit')
    assert not list(tmp_path.iterdir())


def test_cannot_write(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(OSError, match='file'):
        nuclei.convert(str(tmp_path / 'file'))
