"""Memory stays flat, and what would not is seen."""

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope

from fasternet_det.datasets.nuclei import convert
from fasternet_det.deploy import optimize

sys.path.insert(0, str(Path(__file__).parents[2] / 'tools'))
memory = pytest.importorskip('memory')

COUNT = 150
# A map of stride 4 and 40 channels, of the mean size of an image, in float32.
MAP = 40 * (sum(memory.SIDES) / 2 / 4) ** 2 * 4 / 1e6


def test_growth():
    """Of a ramp that is settled after a tenth, 3 MB in a hundred steps."""
    samples = [100.0 * i for i in range(10)] + [900 + i * 0.03 for i in range(90)]
    assert memory.growth(samples) == pytest.approx(30)


def test_page(tmp_path):
    series = {'training': [100.0, 300.0, 290.0], 'eager': [50.0] * 10}
    memory.write(series, tmp_path)
    page = (tmp_path / 'memory.md').read_text()
    assert '| training | 3 | 100 | 100 | 290 | 300 | +95000.0 |' in page
    assert '| eager | 10 | 50 | 50 | 50 | 50 | +0.0 |' in page
    assert (tmp_path / 'memory.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('leaks', [False, True])
def test_predictions(leaks, tmp_path):
    convert(str(tmp_path))
    image = cv2.imread(str(next(tmp_path.glob('val/*.png'))))
    init_default_scope('mmdet')
    model = MODELS.build(Config.fromfile(memory.CONFIG).model).eval()
    model = optimize(model)
    kept = []
    if leaks:
        model.backbone.register_forward_hook(
            lambda module, args, maps: kept.append(maps[0].clone())
        )
    samples = memory.predict(model, image, COUNT)
    print(memory.growth(samples), samples[::10])
