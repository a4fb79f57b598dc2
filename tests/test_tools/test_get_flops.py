import importlib.util
import re
from functools import lru_cache
from pathlib import Path

import pytest
import torch.nn as nn
from mmengine.config import Config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / 'configs' / 'fasternet'

spec = importlib.util.spec_from_file_location(
    'get_flops', ROOT / 'tools/get_flops.py'
)
get_flops = importlib.util.module_from_spec(spec)
spec.loader.exec_module(get_flops)
count_detector = lru_cache(maxsize=None)(get_flops.count_detector)

R50 = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
FROZEN_R50 = 7 * 7 * 3 * 64 + 2 * 64 + 215_808  # stem and first stage


# The figures are from the paper, except for the detectors' FLOPs.
@pytest.mark.parametrize(
    'arch, params, flops',
    [
        ('t0', 3.9, 0.34),
        ('t1', 7.6, 0.85),
        ('t2', 15.0, 1.91),
        ('s', 31.1, 4.56),
        ('m', 53.5, 8.74),
        ('l', 93.5, 15.52),
    ],
)
def test_classifier(arch, params, flops):
    counted = get_flops.count_classifier(arch)
    assert counted[0] / 1e6 == pytest.approx(params, rel=0.01)
    # 0.005: T0's 0.335 G is the paper's 0.34 G, rounded.
    assert counted[1] / 1e9 == pytest.approx(flops, rel=0.01, abs=0.005)
    assert get_flops.PAPER_CLASSIFIERS[arch] == (params, flops)


@pytest.mark.parametrize(
    'config, params, flops',
    [
        (CONFIGS / 'mask-rcnn_fasternet-s_fpn_1x_coco.py', 49.0, 264.8),
        (CONFIGS / 'mask-rcnn_fasternet-m_fpn_1x_coco.py', 71.2, 350.4),
        (CONFIGS / 'mask-rcnn_fasternet-l_fpn_1x_coco.py', 110.9, 490.1),
        (R50, 44.2 + FROZEN_R50 / 1e6, 259.3),
    ],
)
def test_mask_rcnn(config, params, flops):
    counted = count_detector(config)
    assert counted[0] / 1e6 == pytest.approx(params, rel=0.002)
    assert counted[1] / 1e9 == pytest.approx(flops, rel=0.005)
    paper = get_flops.PAPER_DETECTORS[config]
    assert flops - paper[1] == pytest.approx(6.4, abs=0.5)


def test_detector_without_masks():
    convs = 4 * 256 * 256 * 9 * 14**2
    deconv, logits = 256 * 256 * 4 * 14**2, 256 * 80 * 28**2
    faster_rcnn = count_detector(
        'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
    )
    assert count_detector(R50)[1] - faster_rcnn[1] == 100 * (
        convs + deconv + logits
    )


def test_one_stage_detector_scales_with_shape():
    config = CONFIGS / 'retinanet_fasternet-t0_fpn_1x_coco.py'
    small = count_detector(config, (256, 512))
    large = count_detector(config, (512, 1024))
    assert large == (small[0], 4 * small[1])


def test_config_object_and_input_channels():
    path = CONFIGS / 'retinanet_fasternet-t0_fpn_1x_coco.py'
    config = Config.fromfile(path)
    config.model.backbone.in_channels = 1
    grey, colour = get_flops.count_detector(config), count_detector(path)
    assert colour[0] - grey[0] == 2 * 4 * 4 * 40
    assert colour[1] - grey[1] == 2 * 4 * 4 * 40 * (800 // 4) * (1280 // 4)


@pytest.mark.parametrize(
    'family', ['fasternet', 'g_ghost_regnet', 'ghostnet', 'spconv', 'tshaped']
)
def test_readme_holds_the_counts(family):
    folder = CONFIGS.parent / family
    rows = re.findall(
        r'\]\((\S+\.py)\) \| ([\d.]+) \| ([\d.]+) \|',
        (folder / 'README.md').read_text(),
    )
    assert {row[0] for row in rows} == {
        path.name
        for path in folder.glob('*_coco.py')
        if 'lr-decay' not in path.name  # its base's model
    }
    for name, params, flops in rows:
        counted = count_detector(folder / name)
        assert (params, flops) == (
            f'{counted[0] / 1e6:.2f}',
            f'{counted[1] / 1e9:.1f}',
        ), name


def run(monkeypatch, *argv):
    monkeypatch.setattr('sys.argv', ['get_flops.py', *map(str, argv)])
    get_flops.main()


def test_prints_tables(monkeypatch, capsys):
    run(monkeypatch)
    numbers = [
        re.findall(r' ([\d.]+)(?= │)', line)
        for line in capsys.readouterr().out.splitlines()
    ]
    assert ['3.91', '3.9', '0.34', '0.34'] in numbers
    assert ['48.99', '49.0', '264.77', '258'] in numbers
    assert len([row for row in numbers if row]) == 6 + 4


def test_prints_one_detector(monkeypatch, capsys):
    run(
        monkeypatch,
        CONFIGS / 'retinanet_fasternet-t0_fpn_1x_coco.py',
        '--shape',
        800,
        1280,
    )
    assert (
        '11.92 M parameters, 157.80 G FLOPs for 1280x800 pixels'
        in capsys.readouterr().out
    )


def test_shape_without_a_config(monkeypatch, capsys):
    with pytest.raises(SystemExit, match='2'):
        run(monkeypatch, '--shape', 320, 480)
    assert '--shape needs a config' in capsys.readouterr().err


@pytest.mark.parametrize(
    'config, message',
    [
        ('nowhere.py', "No such file or directory: 'nowhere.py'"),
        (CONFIGS / 'fasternet.py', 'fasternet.py has no `model`'),
        (
            'mmdet::detr/detr_r50_8xb2-150e_coco.py',
            'DETR is neither a one-stage detector',
        ),
        (
            'mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py',
            'CascadeRCNN is neither a one-stage detector',
        ),
        (
            'mmdet::tood/tood_r50_fpn_1x_coco.py',
            'tood_r50_fpn_1x_coco.py cannot be counted',
        ),
    ],
)
def test_one_clear_error(monkeypatch, capsys, config, message):
    with pytest.raises(SystemExit, match='2'):
        run(monkeypatch, config)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith('get_flops.py: error: ') and message in error
    assert not nn.Linear(1, 1).weight.is_meta
