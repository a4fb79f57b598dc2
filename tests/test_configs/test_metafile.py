import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def metafile():
    return yaml.safe_load(
        (ROOT / 'configs' / 'fasternet' / 'metafile.yml').read_text()
    )


FAMILIES = dict(
    **dict(fasternet=16, g_ghost_regnet=8, ghostnet=3),
    **dict(saconv=1, spconv=1, tshaped=2, segmentation=4, imagenet=2),
)
DATASETS = r'_(coco|ade20k-512x512|in1k)\.py$'


def test_index():
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    assert index == {
        'Import': [f'configs/{family}/metafile.yml' for family in FAMILIES]
    }


def test_collection(metafile):
    (collection,) = metafile['Collections']
    assert collection['Paper'] == dict(
        URL='https://arxiv.org/abs/2303.03667',
        Title="Run, Don't Walk: Chasing Higher FLOPS for Faster Neural "
        'Networks',
    )


@pytest.mark.parametrize('family', FAMILIES)
def test_lists_every_config_once(family):
    folder = ROOT / 'configs' / family
    metafile = yaml.safe_load((folder / 'metafile.yml').read_text())
    (collection,) = metafile['Collections']
    readme = ROOT / collection['README']
    assert readme == folder / 'README.md'
    paper = collection['Paper']
    assert f'> [{paper["Title"]}]({paper["URL"]}), ' in readme.read_text()
    models = metafile['Models']
    assert {m['In Collection'] for m in models} == {collection['Name']}
    assert sorted(m['Config'] for m in models) == sorted(
        str(path.relative_to(ROOT))
        for path in folder.glob('*.py')
        if re.search(DATASETS, path.name)
    )
    assert len(models) == FAMILIES[family]
    assert all(m['Name'] == Path(m['Config']).stem for m in models)


def test_results_are_the_papers_and_say_so(metafile):
    results = {}
    for model in metafile['Models']:
        # mim iterates over the Results of every model: empty, not absent.
        if not model['Results']:
            assert 'Weights' not in model
            continue
        assert model['Metadata']['Results Source'] == (
            'reported by the paper (arXiv 2303.03667), not measured by this '
            'project'
        )
        results[model['Name']] = [
            (result['Task'], result['Dataset'], result['Metrics'])
            for result in model['Results']
        ]
    assert results == {
        f'mask-rcnn_fasternet-{arch}_fpn_1x_coco': [
            ('Object Detection', 'COCO', {'box AP': box}),
            ('Instance Segmentation', 'COCO', {'mask AP': mask}),
        ]
        for arch, box, mask in (
            ('s', 39.9, 36.9),
            ('m', 43.0, 39.1),
            ('l', 44.0, 39.9),
        )
    }


def test_weights_are_the_released_files(metafile):
    release = 'https://github.com/JierunChen/FasterNet/releases/download/v1.0'
    assert [
        model['Weights'] for model in metafile['Models'] if 'Weights' in model
    ] == [
        f'{release}/mask_rcnn_fasternet_{name}.pth'
        for name in (
            's_fpn_1x_coco_20221111_063419',
            'm_fpn_1x_coco_20221107_124408',
            'l_fpn_1x_coco_20221107_004433',
        )
    ]
