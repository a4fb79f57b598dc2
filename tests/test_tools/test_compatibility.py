import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'tools'))
import benchmark_measure  # noqa: E402
import compatibility  # noqa: E402

NECK = ['model.neck.in_channels']
ALL, LAST = [0, 2, 4, 6], [6]
UNREAD = ['backbone.norm0.weight', 'backbone.norm0.bias']  # by the FPN
# By family: the outputs of the backbone, what else changes, and parameters
# that the loss does not reach.
FAMILIES = {
    'retinanet': (ALL, NECK, UNREAD),
    'faster_rcnn': (ALL, NECK, []),
    'cascade_rcnn': (ALL, NECK, []),
    'double_heads': (ALL, NECK, []),
    'fcos': (ALL, NECK, UNREAD),
    'tood': (ALL, NECK, UNREAD),
    'dyhead': (ALL, ['model.neck.0.in_channels'], UNREAD),
    'yolof': (LAST, NECK, []),
    'detr': (LAST, NECK, []),
    'solo': (ALL, NECK, []),
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Small images, few proposals, and no export, which test_export tests."""
    monkeypatch.setattr(benchmark_measure, 'TURN_SECONDS', 0)
    monkeypatch.setattr(compatibility, 'ROUNDS', 1)
    monkeypatch.setattr(compatibility, 'SIZE', (96, 128))
    monkeypatch.setattr(compatibility, 'PROPOSALS', 20)
    monkeypatch.setattr(compatibility, 'STAGES', compatibility.STAGES[:5])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # whatever else runs
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize('family', FAMILIES)
def test_families(family, tmp_path):
    path = tmp_path / 'row.json'
    row = compatibility.examine(compatibility.new_row(family), path)
    assert json.loads(path.read_text()) == row
    assert row['why'] == {}
    outputs, changed, without = FAMILIES[family]
    assert row['build'] == dict(outputs=outputs, changed=changed)
    assert row['train'] == dict(without=without, frozen=0)
    assert row['predict']['detections'] >= 10
    fast = row['float32']
    assert fast['error'] < 1e-5
    assert fast['common'] == 1
    assert fast['faster'] > 0
    fast = row['bfloat16']
    if fast is not None:
        assert 1e-4 < fast['error'] < 0.03
