from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope='module')
def metafile():
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    assert index == {'Import': ['configs/fasternet/metafile.yml']}
    return yaml.safe_load((ROOT / index['Import'][0]).read_text())


def test_collection(metafile):
    (collection,) = metafile['Collections']
    assert collection['Paper'] == dict(
        URL='https://arxiv.org/abs/2303.03667',
        Title="Run, Don't Walk: Chasing Higher FLOPS for Faster Neural "
        'Networks',
    )
    assert (ROOT / collection['README']).is_file()
    assert {model['In Collection'] for model in metafile['Models']} == {
        collection['Name']
    }


def test_lists_every_config_once(metafile):
    configs = sorted(model['Config'] for model in metafile['Models'])
    assert configs == sorted(
        str(path.relative_to(ROOT))
        for path in ROOT.glob('configs/fasternet/*_coco.py')
    )
    assert len(configs) == 15
    for model in metafile['Models']:
        assert model['Name'] == Path(model['Config']).stem


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
