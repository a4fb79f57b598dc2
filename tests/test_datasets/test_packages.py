"""Craters and HeLa cells' nuclei, from the packages that hold them."""

import hashlib
import io
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmdet.registry import DATASETS
from mmengine.config import Config
from pycocotools.coco import COCO

from fasternet_det.datasets import craters, hela
from fasternet_det.datasets.package import fetch

MINI = Path(__file__).parents[2] / 'configs' / 'mini'
# tiles, annotations, beginning of the sha256 of the file of annotations
KNOWN = {
    ('craters', 'train'): (375, 857, '9736de69dcb67754'),
    ('craters', 'val'): (52, 119, '4a7920b8f78aa51c'),
    ('hela', 'train'): (1260, 5119, '1e8216a9dbc6efb7'),
    ('hela', 'val'): (300, 1064, '73192ce972603487'),
}


@pytest.fixture(scope='module')
def made(registry, tmp_path_factory):
    """Both data sets, and what the packages held."""
    folder, files = tmp_path_factory.mktemp('data'), {}
    for data, module in dict(craters=craters, hela=hela).items():

        def keep(data=data, **kwargs):
            files[data] = fetch(**kwargs)
            return files[data]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, 'fetch', keep)
            module.convert(str(folder / data))
    return folder, files


@pytest.fixture(scope='module')
def roots(made):
    return made[0]


@pytest.fixture(scope='module')
def circles(made):
    """The annotated circles: x, y and diameter."""
    _, table = made[1]['craters']
    return np.loadtxt(io.BytesIO(table), delimiter=',', skiprows=1)


def place(name):
    """Frame, left and top of a tile."""
    *frame, x, y = Path(name).stem.split('_')
    return int(frame[0][1:]) if frame else 0, int(x[1:]), int(y[1:])


@pytest.mark.parametrize('data, split', KNOWN)
def test_counts_and_hash(roots, data, split):
    path = roots / data / 'annotations' / f'{split}.json'
    coco = COCO(path)
    tiles, count, sha256 = KNOWN[data, split]
    assert (len(coco.imgs), len(coco.anns)) == (tiles, count)
    assert hashlib.sha256(path.read_bytes()).hexdigest()[:16] == sha256
    for folder in (split, f'annotations/{split}'):
        names = {p.name for p in (roots / data / folder).iterdir()}
        assert names == {i['file_name'] for i in coco.imgs.values()}
    module = dict(craters=craters, hela=hela)[data]
    assert coco.dataset['info']['description'] == module.SOURCE


@pytest.mark.parametrize('data', ['craters', 'hela'])
def test_splits_are_by_place(roots, data):
    """Apart by a tile or more, in all frames alike."""
    spans = {}
    for split in ('train', 'val'):
        places = [place(p.name) for p in (roots / data / split).iterdir()]
        by_frame = {}
        for frame, x, y in places:
            by_frame.setdefault(frame, set()).add((x, y))
        assert len(by_frame) == (20 if data == 'hela' else 1)
        assert all(own == by_frame[0] for own in by_frame.values())
        axis = 0 if data == 'hela' else 1
        starts = {xy[axis] for xy in by_frame[0]}
        spans[split] = min(starts), max(starts) + 128
    assert spans['val'][0] - spans['train'][1] >= 128, spans


def test_no_crater_is_in_both_splits(roots, circles):
    """And those well inside a split's tiles are annotated there."""
    assert circles.shape == (409, 3)
    folder = roots / 'craters'
    tops = {
        split: [place(p.name)[2] for p in (folder / split).iterdir()]
        for split in ('train', 'val')
    }
    last, first = max(tops['train']) + 128, min(tops['val'])
    _, y, diameter = circles.T
    in_train, in_val = y - diameter / 2 < last, y + diameter / 2 >= first
    assert not (in_train & in_val).any()
    assert (in_train.sum(), in_val.sum()) == (255, 119)


def test_craters_are_the_circles(roots, circles):
    """To a pixel, where no edge cuts them."""
    coco = COCO(roots / 'craters' / 'annotations' / 'val.json')
    seen = 0
    for ann in coco.anns.values():
        _, x, y = place(coco.imgs[ann['image_id']]['file_name'])
        left, top, width, height = ann['bbox']
        if left > 0 and top > 0 and left + width < 128 and top + height < 128:
            seen += 1
            found = [x + left + width / 2, y + top + height / 2, width]
            error = np.abs(circles - found + [0.5, 0.5, 0]).max(1)
            closest = circles[error.argmin()]
            assert error.min() <= 1
            assert ann['area'] == pytest.approx(
                np.pi * closest[2] ** 2 / 4, rel=0.25
            )
    assert seen == 86


def test_paint_keeps_overlapping_discs_apart():
    given = np.array([[10, 12, 9.0], [11, 12, 4.0], [12.5, 14, 9], [30, 2, 8]])
    labels = craters.paint(given, 24, 32)
    assert labels.shape == (3, 24, 32)
    ys, xs = np.mgrid[:24, :32]
    for label, (x, y, diameter) in enumerate(given, 1):
        disc = (xs - x) ** 2 + (ys - y) ** 2 <= diameter**2 / 4
        assert np.array_equal((labels == label).any(0), disc)


def test_hela_is_the_film(made):
    """Pixels of 8 bits of the camera's, and masks of one label each."""
    roots, files = made
    film, labels = (
        cv2.imdecodemulti(np.frombuffer(c, np.uint8), cv2.IMREAD_UNCHANGED)[1]
        for c in files['hela']
    )
    assert sum(len(np.unique(frame)) - 1 for frame in labels) == 3271
    # Nothing lies in the source's edge alone: cutting it off loses none.
    inner = [frame[25:-25, 25:-25] for frame in labels]
    assert sum(len(np.unique(frame)) - 1 for frame in inner) == 3271
    coco = COCO(roots / 'hela' / 'annotations' / 'val.json')
    for index in (0, 7, 133, 299):
        info = coco.imgs[index]
        frame, x, y = place(info['file_name'])
        tile = np.s_[y : y + 128, x : x + 128]
        path = roots / 'hela' / 'val' / info['file_name']
        pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert pixels.dtype == np.uint8
        want = (film[frame][tile].astype(int) - 32768) // 8
        assert np.array_equal(pixels, want.clip(0, 255))
        kept = {}
        for ann in coco.imgToAnns[index]:
            (label,) = np.unique(labels[frame][tile][coco.annToMask(ann) > 0])
            kept[label] = ann['area']
        areas = Counter(labels[frame].ravel().tolist())
        inside = Counter(labels[frame][tile].ravel().tolist())
        assert kept == {
            label: area
            for label, area in inside.items()
            if label and area >= 0.4 * areas[label]
        }


@pytest.mark.parametrize('data', ['craters', 'hela'])
def test_configs_read_it(roots, data):
    """mmdet does, and the means and stds are the training tiles'."""
    cfg = Config.fromfile(MINI / f'rtmdet_fasternet-t0_{data}.py')
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.data_root = str(roots / data)
        dataset = DATASETS.build(loader.dataset)
        assert len(dataset) == (
            dict(craters=264, hela=1222)[data]  # those with objects
            if loader is cfg.train_dataloader
            else KNOWN[data, 'val'][0]
        )
        truths = [dataset[i]['data_samples'].gt_instances for i in range(20)]
        assert sum(map(len, truths)) > 10
        assert all((truth.labels == 0).all() for truth in truths)
    tiles = np.stack(
        [cv2.imread(str(p), 0) for p in (roots / data / 'train').iterdir()]
    )
    preprocessor = cfg.model.data_preprocessor
    assert preprocessor.mean[0] == pytest.approx(tiles.mean(), rel=0.01)
    assert preprocessor.std[0] == pytest.approx(tiles.std(), rel=0.01)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package in a folder, as the only ones that pip finds.

    As a wheel, and as a source distribution that leaves a trace where it runs.
    """
    folder = tmp_path / 'index'
    folder.mkdir()
    monkeypatch.setenv('PIP_CONFIG_FILE', '/dev/null')
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_FIND_LINKS', str(folder))
    monkeypatch.delenv('PIP_EXTRA_INDEX_URL', raising=False)
    wheel = folder / 'thing-1.0-py3-none-any.whl'
    with zipfile.ZipFile(wheel, 'w') as archive:
        archive.writestr('thing/data.txt', 'of a wheel')
        for name, text in (
            ('METADATA', 'Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n'),
            ('WHEEL', 'Wheel-Version: 1.0\nTag: py3-none-any\n'),
            ('RECORD', ''),
        ):
            archive.writestr(f'thing-1.0.dist-info/{name}', text)
    trace = tmp_path / 'ran'
    setup = (
        f'open({str(trace)!r}, "w")\n'
        'from setuptools import setup\nsetup(name="thing", version="2.0")\n'
    )
    sdist = folder / 'thing-2.0.tar.gz'
    with tarfile.open(sdist, 'w:gz') as archive:
        for name, text in (
            ('setup.py', setup),
            ('PKG-INFO', 'Metadata-Version: 1.0\nName: thing\nVersion: 2.0\n'),
            ('data.txt', 'of an sdist'),
        ):
            info = tarfile.TarInfo(f'thing-2.0/{name}')
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    return wheel, sdist, trace


def test_fetch(index):
    wheel, sdist, trace = index
    for version, path, member, text in (
        ('1.0', wheel, 'thing/data.txt', b'of a wheel'),
        ('2.0', sdist, 'thing-2.0/data.txt', b'of an sdist'),
    ):
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        assert fetch('thing', version, sha256, [member]) == [text]
    assert trace.exists()


def test_another_file_is_refused_and_not_run(index):
    *_, trace = index
    with pytest.raises(OSError, match='2.0.* not the one of sha256 0{64}'):
        fetch('thing', '2.0', '0' * 64, ['thing-2.0/data.txt'])
    assert not trace.exists()


@pytest.mark.parametrize('module', [craters, hela])
def test_no_network(index, module, monkeypatch, capsys, tmp_path):
    """One error by the command, and nothing is written."""
    monkeypatch.setattr(sys, 'argv', ['convert', str(tmp_path / 'out')])
    with pytest.raises(SystemExit, match='1'):
        module.main()
    said = capsys.readouterr()
    wanted = '{name}=={version}'.format(**module.PACKAGE)
    assert said.err.startswith(
        f'No {wanted}, which holds the data: pip cannot'
    )
    assert 'is there a network?' in said.err and not said.out
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('module', [craters, hela])
def test_says_source_and_licence(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['convert', 'out'])
    monkeypatch.setattr(module, 'convert', lambda out_dir: None)
    module.main()
    said = capsys.readouterr().out
    for word in (
        'out: ',
        module.PACKAGE['version'],
        'https://',
        'labelled by',
    ):
        assert word in said
    assert '(MIT, by' in said or '(BSD-3, by' in said
