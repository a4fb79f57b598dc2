import copy
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from mmengine.structures import InstanceData
from torch.utils.flop_counter import FlopCounterMode

from fasternet_det import FasterNet

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'tools'))
import benchmark  # noqa: E402
import benchmark_measure  # noqa: E402
import benchmark_models  # noqa: E402
import get_flops  # noqa: E402

RETINANET = str(
    ROOT / 'configs/fasternet/retinanet_fasternet-t0_fpn_1x_coco.py'
)
MASK_RCNN = str(
    ROOT / 'configs/fasternet/mask-rcnn_fasternet-t0_fpn_1x_coco.py'
)
RTMDET = str(ROOT / 'configs/fasternet/rtmdet_fasternet-t0_8xb32-300e_coco.py')


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Small yardsticks, and one thread."""
    monkeypatch.setattr(benchmark_measure, 'MATMULS', ((64, 64, 64),))
    monkeypatch.setattr(benchmark_measure, 'BANDWIDTH_BYTES', 2**20)
    monkeypatch.setattr(benchmark_measure, 'TURN_SECONDS', 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # whatever else runs
    yield
    torch.set_num_threads(threads)


def run(monkeypatch, *argv):
    monkeypatch.setattr('sys.argv', ['benchmark.py', *map(str, argv)])
    benchmark.main()


def test_models(monkeypatch, capsys, tmp_path):
    forms = ['original', 'fold', 'channels_last', 'optimize', 'optimize,bf16']
    sides = [f'fasternet-t0:{form}' for form in forms] + ['resnet-18']
    run(
        monkeypatch,
        *('models', *sides, '--size', 64, 96, '--batch', 2, '--rounds', 2),
        *('--threads', 1, '--out', tmp_path),
    )
    result = json.loads((tmp_path / 'models.json').read_text())
    rows = result['rows']
    assert [row['label'] for row in rows] == sides
    assert (result['size'], result['batch']) == ([64, 96], 2)
    with torch.device('meta'), FlopCounterMode(display=False) as counter:
        FasterNet('t0').eval()(torch.empty(2, 3, 64, 96))
    params = sum(p.numel() for p in FasterNet('t0').parameters())
    for row in rows[:5]:
        assert row['flops'] == counter.get_total_flops() // 2
        assert row['params'] == params
        assert row['reported'] == 71.9
    assert rows[0]['ratio'] == [1, 1, 1]
    assert rows[0]['difference'] is None and rows[5]['difference'] is None
    for row in rows[1:4]:
        assert row['difference'] < 1e-5
    assert 1e-4 < rows[4]['difference'] < 0.1  # bf16
    for row in rows:
        low, median, high = row['seconds']
        assert 0 < low <= median <= high
        assert row['images_per_second'] == pytest.approx(2 / median)
        assert row['flop_per_second'] == pytest.approx(
            2 * row['flops'] / median
        )
        assert row['peak_memory'] > 0
        assert row['traffic'] > 4 * row['params'] / 2
        assert any('conv' in op['name'] for op in row['operators'])
    # Fewer operators, less traffic; half the bytes, less still.
    assert rows[0]['traffic'] > rows[3]['traffic'] > rows[4]['traffic']
    assert result['peaks'].keys() == {'float32', 'bfloat16'}
    installed = version('torch')  # without +cu132, of some wheels
    assert result['machine']['versions']['torch'] == installed
    text = (tmp_path / 'models.md').read_text()
    assert all(f'| {side} |' in text for side in sides)
    assert 0 < (tmp_path / 'models.png').stat().st_size < 150_000
    assert 'fasternet-t0:optimize,bf16' in capsys.readouterr().out


@pytest.mark.parametrize(
    'name', ['g-ghost-002', 'resnet-18-spconv', 'resnet-18-saconv']
)
def test_relatives(name, monkeypatch, tmp_path):
    sides = [name, f'{name}:fold', f'{name}:optimize', f'{name}@onnxruntime']
    run(
        monkeypatch,
        *('models', *sides, '--size', 64, 96, '--rounds', 1),
        *('--threads', 1, '--out', tmp_path),
    )
    rows = json.loads((tmp_path / 'models.json').read_text())['rows']
    assert [row['label'] for row in rows] == sides
    assert all(row['difference'] < 1e-5 for row in rows[1:])


@pytest.mark.parametrize('runtime', ['onnxruntime', 'openvino'])
def test_runtimes(runtime, tmp_path):
    pytest.importorskip('onnxscript')
    pytest.importorskip(runtime)
    sides = ['fasternet-t0', f'fasternet-t0@{runtime}']
    rows = benchmark.measure(sides, (64, 64), threads=1, rounds=1)['rows']
    assert rows[1]['difference'] < 1e-4
    assert rows[1]['peak_memory'] is None


def test_detector():
    sides = [f'{RETINANET}:original', f'{RETINANET}:fold']
    result = benchmark.measure(sides, (128, 128), rounds=1, profiled=False)
    first, second = result['rows']
    assert second['difference'] < 1e-5 and second['agreement'] >= 0.99
    assert first['detections'] == second['detections']
    assert 20 <= first['detections'][0] <= 100
    counted = get_flops.count_detector(RETINANET, (128, 128))
    assert (first['params'], first['flops']) == counted


@torch.no_grad()
def test_mask_rcnn(tmp_path):
    model = benchmark_models.build_model(MASK_RCNN, (128, 128), 1)
    first, folded, other = (
        benchmark_models.build_side(
            benchmark_models.parse(MASK_RCNN + form), model, 1, tmp_path
        )
        for form in (':original', ':fold', ':channels_last')
    )
    rows = benchmark.compare([first, folded])
    assert rows[1]['difference'] < 1e-5 and rows[1]['agreement'] >= 0.99
    assert rows[0]['detections'] == rows[1]['detections'] == [100]
    # mmcv's RoIAlign takes any memory for contiguous, and says nothing.
    with pytest.raises(ValueError, match='of which .* are those of the first'):
        benchmark.compare([first, other])


@torch.no_grad()
def test_rtmdet_finds_something(tmp_path):
    model = benchmark_models.build_model(RTMDET, (128, 128), 2)
    first, optimized = (
        benchmark_models.build_side(
            benchmark_models.parse(RTMDET + form), model, 1, tmp_path
        )
        for form in (':original', ':optimize')
    )
    rows = benchmark.compare([first, optimized])
    assert rows[0]['detections'] == rows[1]['detections'] == [100, 100]
    assert rows[1]['agreement'] >= 0.95


@torch.no_grad()
def test_equal_emptiness_is_no_agreement(tmp_path):
    model = benchmark_models.build_model(RTMDET, (128, 128), 1)
    model.module.bbox_head.test_cfg.score_thr = 1
    side = benchmark_models.build_side(
        benchmark_models.parse(RTMDET), model, 1, tmp_path
    )
    assert [len(found) for found in side.found()] == [0]
    for sides in ([side], [side, side]):
        with pytest.raises(ValueError, match='coco.py finds nothing in an'):
            benchmark.compare(sides)


def test_wrong_weights_are_refused(monkeypatch):
    def broken(model):
        model = copy.deepcopy(model)
        model.stages[6].blocks[1].mlp[3].weight.data[0] += 1
        return model

    monkeypatch.setattr(benchmark_models, 'fold', broken)
    with pytest.raises(ValueError, match='t0:fold does not compute what the'):
        benchmark.measure(
            ['fasternet-t0', 'fasternet-t0:fold'], (64, 64), rounds=1
        )


def test_agreement():
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40]])
    first = InstanceData(
        bboxes=boxes,
        scores=torch.tensor([0.9, 0.8]),
        labels=torch.tensor([1, 2]),
        masks=torch.ones(2, 8, 8, dtype=torch.bool),
    )
    assert benchmark.agreement(first, first) == 1
    assert benchmark.agreement(first[[1, 0]], first) == 1
    assert benchmark.agreement(first[:1], first) == 0.5
    assert benchmark.agreement(first[:0], first) == 0
    with pytest.raises(ValueError, match='finds nothing in an image, so'):
        benchmark.agreement(first[:0], first[:0])
    for key, value in (
        ('bboxes', boxes + torch.tensor([[0.0], [5]])),
        ('scores', torch.tensor([0.9, 0.7])),
        ('labels', torch.tensor([1, 3])),
        ('masks', first.masks & torch.tensor([True, False])[:, None, None]),
    ):
        other = copy.copy(first)
        other[key] = value
        assert benchmark.agreement(other, first) == 0.5, key


def test_original_is_ours(randomise):
    model = randomise(FasterNet('t2', layer_scale_init_value=1))
    original = benchmark_models.as_original(model)
    assert (
        type(model.stages[0].blocks[0]) is not benchmark_models.OriginalBlock
    )
    x = torch.randn(2, 3, 64, 64)
    for a, b in zip(original.eval()(x), model.eval()(x)):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(
    not torch.__version__.startswith(benchmark_models.TIMM_TORCH),
    reason=f"timm's torchvision is for torch {benchmark_models.TIMM_TORCH}x",
)
def test_timm_is_ours_to_the_bit(tmp_path):
    folder = benchmark_models.TIMM
    assert folder.is_dir(), f'{folder} is missing: run `make env`'
    names = ['fasternet-t0', 'fasternet-s']
    sides = [side for name in names for side in (name, f'timm-{name}')]
    subprocess.run(  # its torchvision stays out of this process
        [
            *(sys.executable, 'tools/benchmark.py', 'models', *sides),
            *('--size', '64', '96', '--batch', '2', '--rounds', '1'),
            *('--threads', '1', '--out', tmp_path),
        ],
        cwd=ROOT,
        check=True,
    )
    result = json.loads((tmp_path / 'models.json').read_text())
    rows = result['rows']
    assert [row['label'] for row in rows] == sides
    assert [row['difference'] for row in rows] == [None, 0, None, 0]
    assert [row['params'] for row in rows[::2]] == [
        sum(p.numel() for p in FasterNet(arch).parameters())
        for arch in ('t0', 's')
    ]
    assert result['machine']['versions']['timm'] >= '1.0.16'
    assert 'timm' not in sys.modules


@pytest.mark.parametrize('missing', ['folder', 'torch'])
def test_timm_is_left_out(missing, monkeypatch, capsys, tmp_path):
    if missing == 'folder':
        monkeypatch.setattr(benchmark_models, 'TIMM_TORCH', torch.__version__)
        monkeypatch.setattr(benchmark_models, 'TIMM', tmp_path / 'timm')
        reason = f'{tmp_path / "timm"} is missing: `make env` installs timm'
    else:
        monkeypatch.setattr(benchmark_models, 'TIMM_TORCH', '1.13.')
        reason = "timm's torchvision is for torch 1.13.x, this is"
    sides = ['timm-fasternet-t0', 'fasternet-t0']
    rows = benchmark.measure(sides, (64, 64), rounds=1, profiled=False)['rows']
    assert [row['side'] for row in rows] == ['fasternet-t0']
    assert f'Without the sides of timm: {reason}' in capsys.readouterr().err
    with pytest.raises(ValueError, match=reason):
        benchmark.measure(sides[:1], (64, 64), rounds=1)


def test_turns_alternate():
    turns = []
    runs = [lambda n=name: turns.append(n) for name in 'abc']
    times = benchmark_measure.alternate(runs, 4)
    assert ''.join(turns) == 'abc' * 6  # two of them untimed
    assert [len(series) for series in times] == [4] * 3


def test_memory_and_traffic():
    def allocate():
        a = torch.empty(1000, 1000)
        b = torch.empty(2000, 1000)
        del a
        return b, torch.empty(500, 1000)

    assert benchmark_measure.peak_memory(allocate) == 12_000_000
    x = torch.zeros(10, 10)
    assert benchmark_measure.count_traffic(lambda: x + x.t()) == 3 * 400


def test_difference():
    x = torch.tensor([1.0, -2.0])
    assert benchmark_measure.difference([x + 0.5, x], [x, x]) == 0.25
    with pytest.raises(ValueError, match=r'shapes \[\(1,\)\], expected'):
        benchmark_measure.difference([x[:1]], [x])
    with pytest.raises(ValueError, match='not finite'):
        benchmark_measure.difference([x / 0], [x])


def test_training(monkeypatch, tmp_path):
    run(
        monkeypatch,
        *('training', RETINANET, '--size', 64, 64, '--rounds', 1),
        *('--out', tmp_path),
    )
    rows = json.loads((tmp_path / 'training.json').read_text())['rows']
    assert [r['side'] for r in rows] == ['original', 'ours', 'ours, with_cp']
    for row in rows:
        assert row['loss'] == pytest.approx(rows[0]['loss'], rel=1e-5)
        assert row['difference'] < 1e-4
        # weights and both moments of AdamW
        assert row['held'] >= 3 * 4 * 11.9e6
        assert row['peak_memory'] > row['held']


def test_operators(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark, 'PAPER_MAPS', ((64, 6),))
    run(monkeypatch, 'operators', '--rounds', 1, '--out', tmp_path)
    rows = json.loads((tmp_path / 'operators.json').read_text())['rows']
    flops = {row['operator']: row['flops'] for row in rows}
    pconv = flops.pop('PConv, r = 1/4')
    assert pconv == 10 * 9 * 16 * 16 * 6 * 6
    assert flops.pop('regular') == 16 * pconv
    assert flops.pop('depthwise') == pconv * 4 // 16
    assert set(flops.values()) == {pconv}


def test_winograd(monkeypatch, tmp_path):
    maps = ((2, 8, 12), (1, 16, 16))
    monkeypatch.setattr(benchmark, 'WINOGRAD_MAPS', maps)
    monkeypatch.setattr(benchmark, 'CHANNELS', (8, 128))
    run(monkeypatch, 'winograd', '--rounds', 1, '--out', tmp_path)
    rows = json.loads((tmp_path / 'winograd.json').read_text())['rows']
    assert [row['used'] for row in rows] == [False, False, False, True]
    assert rows[0]['map'] == [2, 8, 8, 12]
    assert 0 < max(row['difference'] for row in rows) < 1e-5


def test_scaling_and_report(monkeypatch, tmp_path):
    monkeypatch.setenv('MALLOC_TRIM_THRESHOLD_', '99')
    command = ['scaling', 'fasternet-t0', '--rounds', 1, '--out', tmp_path]
    run(monkeypatch, *command, '--sizes', '64x64', '64x128', '--batches', 1, 2)
    path = tmp_path / 'scaling.json'
    result = json.loads(path.read_text())
    points = [(p['size'], p['batch']) for p in result['points']]
    assert points == [([64, 64], 1), ([64, 128], 1), ([64, 64], 2)]
    page = tmp_path / 'page.md'
    run(monkeypatch, 'report', tmp_path, '--out', page)
    text = page.read_text()
    assert (
        '| side | 64x64, batch 1 | 64x128, batch 1 | 64x64, batch 2 |' in text
    )
    assert result['machine']['cpu'] in text and str(tmp_path) not in text
    assert (
        '\nMALLOC_TRIM_THRESHOLD_=99 python tools/benchmark.py scaling '
        'fasternet-t0 --rounds 1 '
    ) in text
    assert (tmp_path / 'page_scaling.png').stat().st_size < 150_000
    result['machine']['cores'] += 1
    (tmp_path / 'other.json').write_text(json.dumps(result))
    with pytest.raises(SystemExit, match='2'):
        run(monkeypatch, 'report', tmp_path, '--out', page)


def test_goals():
    operators = [
        dict(name='conv', shapes=[[1, 2]], calls=1, seconds=1.0, share=1.0)
    ]

    def row(ratio, seconds=1.0, **others):
        return dict(
            ratio=[ratio] * 3,
            seconds=[seconds] * 3,
            operators=operators,
            **others,
        )

    size = [8, 9]
    first = row(1)
    runs = {
        'backbone-s': dict(
            size=size,
            rows=[first, row(1.6, peak_share=0.79), row(7), row(2, 1.5)],
        ),
        'backbone-t0': dict(size=size, rows=[first, row(1.29)]),
        'mask-rcnn-s': dict(size=size, rows=[first, first, row(4.1)]),
        'mask-rcnn-t0': dict(size=size, rows=[first, first, row(3.9)]),
        'training': dict(
            size=size,
            rows=[
                first,
                row(1, memory_ratio=0.85, beyond_ratio=0.8, side='ours'),
                row(0.9, memory_ratio=0.7, beyond_ratio=0.5, side='with_cp'),
            ],
        ),
    }
    rows = benchmark.judge(runs)
    assert [row['reached'] for row in rows] == [
        *(True, False, True, True),  # backbone S
        *(False, True, False),
        *(True, True, False),  # training
    ]
    assert rows[1]['value'] == '79%' and rows[3]['value'] == '1.50x'
    runs['backbone-s']['rows'].pop()
    assert not benchmark.judge(runs)[3]['reached']
    result = dict(kind='goals', rows=rows, runs={})
    text = benchmark.to_markdown(result)
    assert text.count('| yes |') == 6 and text.count('| no |') == 4
    assert '| `conv` | 1x2 | 1 | 1000.0 | 100% |' in text


def test_goals_command(monkeypatch, tmp_path):
    """The whole command, on detectors of the right names but small."""
    dtypes = {torch.float32, torch.bfloat16}
    monkeypatch.setattr(benchmark, 'kernel_dtypes', lambda: dtypes)
    monkeypatch.setattr(benchmark, 'CONFIGS', tmp_path)
    monkeypatch.setattr(benchmark, 'find_spec', lambda name: None)
    # Profiles, most of the time, and OpenVINO have tests above.
    top = [dict(name='a', shapes=[[1, 2]], calls=1, seconds=1.0, share=1.0)]
    monkeypatch.setattr(benchmark, 'top_operators', lambda run: top)
    mini = ROOT / 'configs' / 'mini'
    for kind, arch in (
        ('mask-rcnn', 's'),
        ('mask-rcnn', 't0'),
        ('retinanet', 's'),
    ):
        small = str(mini / f'{kind}_fasternet-t0_fpn_nuclei.py')
        path = tmp_path / f'{kind}_fasternet-{arch}_fpn_1x_coco.py'
        path.write_text(f'_base_ = [{small!r}]\n')
    command = ['--shrink', 99, '--rounds', 1, '--threads', 1]
    run(monkeypatch, 'goals', *command, '--out', tmp_path / 'out')
    result = json.loads((tmp_path / 'out' / 'goals.json').read_text())
    runs = result['runs']
    assert {name: run['size'] for name, run in runs.items()} == {
        name: [64, 64]
        for name in (
            *('backbone-s', 'backbone-t0', 'mask-rcnn-s', 'mask-rcnn-t0'),
            'training',
        )
    }
    _, float32, bfloat16 = runs['backbone-s']['rows']
    assert float32['difference'] < 1e-5 < bfloat16['difference'] < 0.1
    for arch in ('s', 't0'):
        rows = runs[f'mask-rcnn-{arch}']['rows']
        assert rows[0]['detections'] == rows[1]['detections']
        assert 20 <= rows[0]['detections'][0] <= 100
        assert rows[1]['agreement'] >= 0.95
    original, *ours = runs['training']['rows']
    for row in ours:
        assert row['loss'] == pytest.approx(original['loss'], rel=1e-5)
    # What the table says is what was measured.
    training = 'training step of RetinaNet S, 2 images 64x64'
    expected = {
        'backbone S, 64x64, float32': (float32, 1.5),
        'backbone S, 64x64, bf16': (bfloat16, 7),
        'backbone T0, 64x64, float32, 1 thread': (
            runs['backbone-t0']['rows'][1],
            1.3,
        ),
        'Mask R-CNN S, whole, 64x64, bf16': (
            runs['mask-rcnn-s']['rows'][2],
            4,
        ),
        'Mask R-CNN T0, whole, 64x64, bf16': (
            runs['mask-rcnn-t0']['rows'][2],
            4,
        ),
        f'{training}: time': (ours[0], 1),
    }
    goals = {row['goal']: row for row in result['rows']}
    assert len(goals) == 10
    for goal, (row, least) in expected.items():
        median = row['ratio'][1]
        assert goals[goal]['target'] == f'>= {least}x'
        assert goals[goal]['value'].startswith(f'{median:.2f}x (')
        assert goals[goal]['reached'] == (median >= least)
    for row, most in zip(ours, (0.85, 0.6)):
        goal = goals[f'{training}: peak memory, {row["side"]}']
        assert goal['value'].startswith(f'{row["memory_ratio"]:.2f}x (')
        assert goal['reached'] == (row['memory_ratio'] <= most)
    text = (tmp_path / 'out' / 'goals.md').read_text()
    assert all(f'| {goal} |' in text for goal in goals)

    # On a CPU without bfloat16, the goals are the same ten.
    for name in ('backbone-s', 'mask-rcnn-s', 'mask-rcnn-t0'):
        del runs[name]['rows'][2:]
    left = benchmark.judge(runs)
    assert [row['goal'] for row in left] == list(goals)
    for row in left:
        if 'bf16' in row['goal']:
            assert row['value'] == 'this CPU does not compute in bfloat16'
            assert not row['reached']
        else:
            assert row == goals[row['goal']]


@pytest.mark.parametrize(
    'side, message',
    [
        ('fasternet-x', "'fasternet-x' is neither a config of a detector nor"),
        ('fasternet-t0:fats', "the option 'fats' is not one of original, "),
        ('fasternet-t0@tvm', "the runtime 'tvm' is not one of torch, "),
        ('fasternet-t0:', 'is not NAME[@RUNTIME][:option,...]'),
        ('fasternet-t0:int8', 'int8 is of the runtimes onnxruntime and'),
        ('fasternet-t0@openvino:fold', 'of the options only bf16 and int8'),
        ('fasternet-t0@onnxruntime:bf16', 'ONNX Runtime has no bf16'),
        ('fasternet-t0:optimize,fold', 'optimize folds'),
        ('fasternet-t0:direct', 'direct is an option of optimize'),
        (f'{RETINANET}:bf16', 'bf16 and compile go with optimize'),
    ],
)
def test_one_clear_error(monkeypatch, capsys, tmp_path, side, message):
    with pytest.raises(SystemExit, match='2'):
        run(
            monkeypatch,
            *('models', side, '--size', 64, 64, '--out', tmp_path / 'new'),
        )
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith('benchmark.py: error: ') and message in error
    assert not (tmp_path / 'new').exists()
