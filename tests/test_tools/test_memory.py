"""Memory stays flat, and what would not is seen."""

import sys
from pathlib import Path

import cv2
import pytest
from mmdet.registry import MODELS
from mmengine.registry import init_default_scope

from fasternet_det.datasets.nuclei import convert
from fasternet_det.deploy import optimize

sys.path.insert(0, str(Path(__file__).parents[2] / 'tools'))
import memory  # noqa: E402

# In MB, a map of stride 8 and 32 channels of an image of the mean size.
MAP = 32 * (sum(memory.SIDES) / 2 / 8) ** 2 * 4 / 1e6
# Until then, all buffers have had their largest size.
SETTLED, COUNT = 30, 150


def test_growth():
    """Where a tenth of the steps is a steeper start."""
    samples = [100.0 * i for i in range(10)]
    samples += [900 + 0.03 * i for i in range(90)]
    assert memory.growth(samples) == pytest.approx(30)


def test_page(tmp_path):
    resident = [100.0, 300.0, 290.0, 290.0, 290.0]
    series = {'eager': list(zip(resident, [50.0] * 5))}
    memory.write(series, 7, tmp_path)
    page = (tmp_path / 'memory.md').read_text()
    row = '| eager | 5 | 100 | 300 | 290 | -3000.0 | 50 | 50 | 50 | +0.0 |'
    assert row in page
    assert (tmp_path / 'memory.png').read_bytes().startswith(b'\x89PNG')


def predict(folder, leaks):
    """Memory over predictions of the fast form, which packs by size."""
    convert(str(folder))
    image = cv2.imread(str(next(folder.glob('val/*.png'))))
    init_default_scope('mmdet')
    model = optimize(MODELS.build(memory.small_config().model).eval())
    kept = []
    if leaks:
        model.backbone.register_forward_hook(
            lambda module, args, maps: kept.append(maps[0].clone())
        )
    samples, found = memory.predict(model, image, COUNT)
    if not leaks:
        few = memory.predict(model, image, 20, threads=2)[1]
        assert few == 2 * found[:20] and len(set(found)) > 100
    return samples[SETTLED:]


@pytest.mark.parametrize('leaks', [False, True])
def test_predictions(leaks, tmp_path):
    """In a process of their own: this one has memory to spare."""
    samples = memory.alone(predict, tmp_path, leaks)
    resident, in_use = map(memory.growth, zip(*samples))
    assert (in_use > 1000 * MAP / 2) == leaks
    # Loosely: how much is free between what is in use depends on the machine.
    assert resident < 2000 * MAP
