"""What runs on a GPU, and its rehearsal without one."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'tools'))
pytestmark = pytest.mark.deploy
SECTIONS = (
    'machine parity forms parts detectors training latency graphs syncbn '
    'memory compile'
).split()


@pytest.fixture
def gpu(monkeypatch):
    import gpu  # wants what `optimize` does

    monkeypatch.setenv('KINETO_LOG_LEVEL', '99')
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    yield gpu
    cudnn.allow_tf32, matmul.allow_tf32 = before


def run(gpu, device, out):
    status = gpu.main(['--device', device, '--out', str(out)])
    result = json.loads((out / 'gpu.json').read_text())
    assert list(result['sections']) == SECTIONS
    page = (out / 'gpu.md').read_text()
    assert all(f'\n## {name}\n' in page for name in SECTIONS)
    failed = [
        row
        for rows in result['sections'].values()
        for row in rows
        if not row.get('ok', True)
    ]
    assert (status, failed) == (0, [])
    return result['sections']


@pytest.mark.gpu
def test_on_a_gpu(gpu, tmp_path):
    """Ten minutes."""
    sections = run(gpu, 'cuda', tmp_path)
    assert sections['graphs'] and sections['machine'][0]['side']


def test_rehearsal(gpu, tmp_path):
    sections = run(gpu, 'cpu', tmp_path)
    found = {
        name: [row for row in rows if 'why' not in row]
        for name, rows in sections.items()
    }
    left_out = {
        name: [row['why'] for row in rows if 'why' in row]
        for name, rows in sections.items()
    }
    assert left_out['graphs'] == left_out['compile'] == ['needs a GPU']
    assert left_out['training'] == ["mmengine's AMP needs a GPU"]
    assert found['graphs'] == []
    for name in ('parity', 'forms', 'parts', 'training', 'syncbn', 'compile'):
        for row in found[name]:
            errors = [row.get(k, 0) for k in ('maps', 'difference')]
            limit = 0.1 if '16' in row['side'] else 1e-4
            assert max(errors) <= limit, (name, row)
    # The second process counted: BatchNorm's own, or half of the images,
    # gives other gradients.
    assert 0 < found['syncbn'][0]['difference'] < 1e-5
    assert {row['side'].split(',')[0] for row in found['parts']} >= {
        *('FasterNetBlock', 'Conv2d', 'ConvModule', 'Linear'),
        'ConvTranspose2d',
    }
    assert found['detectors'][1]['in common (%)'] > 95
    memory = {r['side'].split()[-1]: r['memory (MB)'] for r in found['memory']}
    assert memory.keys() == {'original', 'plain', 'with_cp'}
    assert all(row['ms'][1] > 0 for row in found['latency'])


def test_what_fails_stands_alone(gpu, tmp_path):
    """A process dies, another goes on, until the time is over."""

    def rows():
        yield dict(side='first')
        raise ZeroDivisionError('one\ntwo')

    assert list(gpu.attempt('second', rows())) == [
        dict(side='first'),
        dict(side='second', why='ZeroDivisionError: one', ok=False),
    ]
    todo = [('nonsense', 0), ('machine', 0)]
    (name, dead), (_, alive) = gpu.run_apart('cpu', todo, 300)
    assert name == 'nonsense' and dead == [
        dict(side='nonsense 1', why='process ended: 1', ok=False)
    ]
    assert alive[0]['side'] == 'cpu'
    ((_, late),) = gpu.run_apart('cpu', todo[1:], 0)
    assert late == [dict(side='machine 1', why='no time left', ok=False)]
    assert gpu.is_broken([dict(why='RuntimeError: CUDA error: assert')])


@pytest.mark.parametrize('faster, ok', [(0.5, False), (0.95, True)])
def test_slower_parts_fail(faster, ok, gpu, monkeypatch):
    """On a GPU; this only says that it had been one."""

    def times(runs):
        return [
            {'side': name, 'times faster': [factor] * 3}
            for name, factor in zip(runs, (1, faster))
        ]

    monkeypatch.setattr(gpu, 'times', times)
    monkeypatch.setattr(gpu, 'ON_GPU', True)
    conv, x = torch.nn.Conv2d(3, 4, 3).eval(), torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        rows = list(gpu.part('conv', conv, (x,), torch.float32))
    assert [row['ok'] for row in rows] == [True, ok]


def test_values_are_compared(gpu):
    x = torch.ones(2, 3)
    assert gpu.off([x * 1.5], [x]) == pytest.approx(0.5)
    with pytest.raises(ValueError, match='not finite'):
        gpu.off([x / 0], [x])
