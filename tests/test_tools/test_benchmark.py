import copy
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData
from torch.utils.flop_counter import FlopCounterMode

from fasternet_det import FasterNet
from fasternet_det.deploy.memory import new_empty

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'tools'))
import get_flops  # noqa: E402
import measuring  # noqa: E402
import seeded  # noqa: E402
from benchmark import __main__, experiments, models, report  # noqa: E402

CONFIGS = ROOT / 'configs'
MASK_RCNN = str(CONFIGS / 'mini/mask-rcnn_fasternet-t0_fpn_nuclei.py')
RTMDET = str(CONFIGS / 'fasternet/rtmdet_fasternet-t0_8xb32-300e_coco.py')
MINI = str(CONFIGS / 'mini/retinanet_fasternet-t0_fpn_nuclei.py')


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Small yardsticks, and one thread."""
    monkeypatch.setattr(experiments, 'MATMULS', ((64, 64, 64),))
    monkeypatch.setattr(measuring, 'TURN_SECONDS', 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # whatever else runs
    yield
    torch.set_num_threads(threads)


def run(monkeypatch, *argv):
    monkeypatch.setattr('sys.argv', ['benchmark', *map(str, argv)])
    __main__.main()


def build(config, forms, folder, batch=1):
    model = models.build_model(config, (128, 128), batch)
    return [
        models.build_side(models.parse(config + form), model, folder)
        for form in forms
    ]


def test_models(monkeypatch, capsys, tmp_path):
    forms = ['original', 'fold', 'channels_last', 'optimize', 'optimize,bf16']
    sides = [f'fasternet-t0:{form}' for form in forms] + ['resnet-18']
    run(
        monkeypatch,
        *('models', *sides, '--size', 64, 96, '--batch', 2, '--rounds', 2),
        *('--threads', 1, '--out', tmp_path),
    )
    result = json.loads((tmp_path / 'models.json').read_text())
    rows, peaks = result['rows'][:6], result['rows'][6:]
    assert [row['side'] for row in rows] == sides
    assert result['settings'] == dict(
        pixels='64x96', batch=2, threads=1, rounds=2, weights='seeded'
    )
    with torch.device('meta'), FlopCounterMode(display=False) as counter:
        FasterNet('t0').eval()(torch.empty(2, 3, 64, 96))
    params = sum(p.numel() for p in FasterNet('t0').parameters())
    for row in rows[:5]:
        assert row['FLOPs (G)'] == counter.get_total_flops() / 2e9
        assert row['params (M)'] == params / 1e6
        assert row['top-1 (%), reported'] == 71.9
    assert rows[0]['times faster'] == [1, 1, 1]
    assert rows[0]['difference'] == rows[5]['difference'] == 0
    assert all(0 < row['difference'] < 1e-5 for row in rows[1:4])
    assert 1e-4 < rows[4]['difference'] < 0.1  # bf16
    for row, peak in zip(rows, [peaks[0]] * 4 + [peaks[1], peaks[0]]):
        low, median, high = row['ms']
        assert 0 < low <= median <= high
        assert sum(row['times']) == pytest.approx(median / 500)
        assert row['images/s'] == pytest.approx(2000 / median)
        assert row['GFLOP/s'] == pytest.approx(2e3 * row['FLOPs (G)'] / median)
        shares = [
            100 * row['GFLOP/s'] * median / 1e3 / a * b / peak_work(peak)
            for a, b in zip(row['times'], peak['times'])
        ]
        assert row['of peak (%)'] == pytest.approx(sum(shares) / 2)
        assert row['memory (MB)'] > 0 and row['held (MB)'] is None
        assert 'conv' in row['operators']
    installed = version('torch')  # without +cu132, of some wheels
    assert result['machine']['versions']['torch'] == installed
    text = (tmp_path / 'models.md').read_text()
    assert all(f'| {side} |' in text for side in sides)
    assert '| ms | times faster |' in text and '| times |' not in text
    assert 0 < (tmp_path / 'models.png').stat().st_size < 150_000
    assert 'fasternet-t0:optimize,bf16' in capsys.readouterr().out


def peak_work(peak):
    """GFLOP of a product of 64x64 matrices."""
    assert peak['GFLOP/s'] * peak['ms'][1] == pytest.approx(2 * 64**3 / 1e6)
    return 2 * 64**3 / 1e9


def test_relatives():
    names = ['g-ghost-002', 'resnet-18-spconv', 'resnet-18-saconv']
    sides = [name + form for name in names for form in ('', ':optimize')]
    rows = experiments.measure(sides, (64, 64), rounds=1, with_profile=False)
    off = [row['difference'] for row in rows['rows'][:6]]
    assert off[::2] == [0, 0, 0] and 0 < max(off) < 1e-5


def test_runtimes(capsys, monkeypatch):
    """Every side that there is, and why the others are not."""
    for name in ('onnxscript', 'onnxruntime', 'openvino'):
        pytest.importorskip(name)
    monkeypatch.setattr(models, 'kernel_dtypes', lambda: {torch.float32})
    result = experiments.measure(['fasternet-t0:every'], (64, 64), rounds=1)
    rows = {row['form']: row for row in result['rows'] if 'form' in row}
    assert rows.keys() == set(models.EVERY)
    for form in ('@onnxruntime', '@openvino'):
        assert 0 < rows[form]['difference'] < 1e-5
        assert 'memory (MB)' not in rows[form]
        assert 1e-3 < rows[f'{form}:int8']['difference'] < 0.5
        why = 'this CPU does not compute in bfloat16'
        assert rows[f'{form}:bf16']['why'] == why
    assert f'Without fasternet-t0@openvino:bf16: {why}' in (
        capsys.readouterr().err
    )
    text = report.to_markdown(result)
    assert f'Left out: fasternet-t0@openvino:bf16: {why}.' in text


def test_detector():
    sides = [f'{MINI}:original', f'{MINI}:fold']
    result = experiments.measure(sides, (128, 128), rounds=1)
    first, second = result['rows'][:2]
    assert second['difference'] < 1e-5 and second['in common (%)'] >= 99
    assert first['detections'] == second['detections']
    assert 20 <= first['detections'][0] <= 100
    counted = get_flops.count_detector(MINI, (128, 128))
    assert (first['params (M)'] * 1e6, first['FLOPs (G)'] * 1e9) == counted


@torch.no_grad()
def test_mask_rcnn(tmp_path):
    forms = (':original', ':fold', ':channels_last')
    first, folded, other = build(MASK_RCNN, forms, tmp_path)
    rows = experiments.compare([first, folded])
    assert rows[1]['difference'] < 1e-5 and rows[1]['in common (%)'] >= 95
    assert all(row['detections'] >= [90] for row in rows[:2])
    # mmcv's RoIAlign takes any memory for contiguous, and says nothing.
    with pytest.raises(ValueError, match='of which .* are those of the first'):
        experiments.compare([first, other])


@torch.no_grad()
def test_rtmdet_finds_something(tmp_path):
    sides = build(RTMDET, (':original', ':optimize'), tmp_path, batch=2)
    rows = experiments.compare(sides)
    assert rows[0]['detections'] == rows[1]['detections'] == [100, 100]
    assert rows[1]['in common (%)'] >= 95
    sides[0].model.module.bbox_head.test_cfg.score_thr = 1
    (side,) = build(RTMDET, [''], tmp_path)
    side.module.bbox_head.test_cfg.score_thr = 1
    assert [len(found) for found in side.found()] == [0]
    for empty in ([side], [side, side]):  # equal emptiness is no agreement
        with pytest.raises(ValueError, match='coco finds nothing in an'):
            experiments.compare(empty)


def test_boxes_are_as_the_graph_gives_them(monkeypatch, tmp_path):
    """YOLOX's reach beyond the image."""
    module = pytest.importorskip('fasternet_det.deploy.export')
    dets = np.float32([[[1, 2, 150, 140, 0.9]]])  # in 128x128 pixels
    outputs = [dets, np.array([[0]])]
    monkeypatch.setattr(module, 'export', lambda *args, **kwargs: None)
    monkeypatch.setattr(module, 'load', lambda *args: lambda images: outputs)
    (side,) = build(MINI, ['@onnxruntime'], tmp_path)
    (found,) = side.found()
    expected = torch.tensor(dets[0, :, :4]) / seeded.SCALE
    torch.testing.assert_close(found.bboxes, expected)


def test_wrong_weights_are_refused(monkeypatch):
    def broken(model):
        model.stages[6].blocks[1].mlp[3].weight.data[0] += 1
        return model

    monkeypatch.setitem(models.PLAIN, 'fold', broken)
    sides = ['fasternet-t0', 'fasternet-t0:fold']
    with pytest.raises(ValueError, match='t0:fold does not compute what the'):
        experiments.measure(sides, (64, 64), rounds=1)


def test_agreement():
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40]])
    first = InstanceData(
        bboxes=boxes,
        scores=torch.tensor([0.9, 0.8]),
        labels=torch.tensor([1, 2]),
        masks=torch.ones(2, 8, 8, dtype=torch.bool),
    )
    assert seeded.agreement(first, first) == 1
    assert seeded.agreement(first[[1, 0]], first) == 1
    assert seeded.agreement(first[:1], first) == 0.5
    assert seeded.agreement(first[:0], first) == 0
    with pytest.raises(ValueError, match='finds nothing in an image, so'):
        seeded.agreement(first[:0], first[:0])
    for key, value in (
        ('bboxes', boxes + torch.tensor([[0.0], [5]])),
        ('scores', torch.tensor([0.9, 0.7])),
        ('labels', torch.tensor([1, 3])),
        ('masks', first.masks & torch.tensor([True, False])[:, None, None]),
    ):
        other = copy.copy(first)
        other[key] = value
        assert seeded.agreement(other, first) == 0.5, key


def test_calibration():
    """What the preprocessor makes of it are the images of the benchmark."""
    model = models.build_model(RTMDET, (64, 96), 2)
    (batch,) = model.calibration()
    taken = model.module.data_preprocessor(batch)['inputs']
    assert torch.allclose(taken, model.inputs, atol=1e-5)
    backbone = models.build_model('fasternet-t0', (64, 96), 2)
    assert backbone.calibration() == [backbone.inputs]


def test_original_is_ours(randomise):
    model = randomise(FasterNet('t2', layer_scale_init_value=1)).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model(x)
    original = models.as_original(model)
    assert isinstance(original.stages[0].blocks[0], models.OriginalBlock)
    for a, b in zip(original(x), expected):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


TIMM = """
import sys
import torch
from fasternet_det import FasterNet
from fasternet_det.checkpoint import fasternet_to_timm
from benchmark import experiments, models
names = ['timm-mobilevit_xxs', 'timm-cpubone_b0_bfrobust']
rows = experiments.measure(names, (64, 64), rounds=1)['rows']
assert [round(r['params (M)'], 2) for r in rows[:2]] == [0.95, 5.91], rows
timm, _ = models.import_timm()
for arch in ('t0', 's'):
    ours = models.fill(FasterNet(arch)).eval()
    theirs = timm.create_model(f'fasternet_{arch}', num_classes=0).eval()
    weights = fasternet_to_timm(ours.state_dict())
    missing, left = theirs.load_state_dict(weights, strict=False)
    assert (missing, left) == (['conv_head.weight'], [])
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        maps = theirs.forward_intermediates(x, intermediates_only=True)
        for i, a, b in zip(ours.out_indices, maps, ours(x)):
            assert torch.equal(getattr(ours, f'norm{i}')(a), b), (arch, i)
"""


@pytest.mark.skipif(
    not torch.__version__.startswith(models.TIMM_TORCH),
    reason=f"timm's torchvision is for torch {models.TIMM_TORCH}x",
)
def test_timm():
    """Its backbones are measured, its FasterNet is ours to the bit."""
    folder = measuring.TIMM
    assert folder.is_dir(), f'{folder} is missing: run `make env`'
    subprocess.run(  # its torchvision stays out of this process
        [sys.executable, '-c', TIMM], cwd=ROOT / 'tools', check=True
    )
    assert 'timm' not in sys.modules


@pytest.mark.parametrize('missing', ['folder', 'torch'])
def test_timm_is_left_out(missing, monkeypatch, tmp_path):
    if missing == 'folder':
        monkeypatch.setattr(models, 'TIMM_TORCH', torch.__version__)
        monkeypatch.setattr(models, 'TIMM', tmp_path / 'timm')
        reason = f'timm in {tmp_path / "timm"}, where `make env` installs it'
    else:
        monkeypatch.setattr(models, 'TIMM_TORCH', '1.13.')
        reason = 'needs torch 1.13.x, this is'
    sides = ['timm-mobilevit_xxs', 'fasternet-t0']
    built, rows = models.build_sides(sides, lambda *side: side, (64, 64), 1)
    assert [spec.name for spec, _ in built] == ['fasternet-t0']
    assert rows[0]['side'] == 'timm-mobilevit_xxs'
    assert reason in rows[0]['why']
    with pytest.raises(ValueError, match=reason):
        models.build_sides(sides[:1], lambda *side: side, (64, 64), 1)


def test_turns_alternate():
    turns = []
    runs = [lambda n=name: turns.append(n) for name in 'abc']
    times = measuring.alternate(runs, 4)
    assert ''.join(turns) == 'abc' * 6  # two of them untimed
    assert [len(series) for series in times] == [4] * 3


def test_profile():
    def allocate():
        a = torch.empty(1000, 1000)
        b = torch.empty(2000, 1000)
        del a
        return b, torch.empty(500, 1000)

    peak, operators = experiments.profiled(allocate)
    assert peak == 12_000_000 and 'aten::empty' in operators


def test_profile_counts_what_is_kept():
    """The memory of large maps, which an earlier run has left."""
    x = torch.empty(0)
    peak, _ = experiments.profiled(lambda: new_empty(x, 10_000_000).sum())
    assert 40_000_000 <= peak < 40_001_000


@pytest.mark.parametrize('kind', ['mask-rcnn', 'retinanet'])
@torch.no_grad()
def test_scores_do_not_saturate(kind):
    """Of equal ones, rounding would choose."""
    name = f'configs/fasternet/{kind}_fasternet-s_fpn_1x_coco.py'
    detector = models.build_model(name, (256, 320), 1).module
    maps = detector.extract_feat(torch.randn(1, 3, 256, 320))
    head = detector.rpn_head if kind == 'mask-rcnn' else detector.bbox_head
    for logits in head(maps)[0]:
        scores = logits.flatten().sigmoid()
        best = scores.topk(min(100, len(scores))).values
        assert best.max() < 0.9999 and len(best.unique()) > 0.95 * len(best)


def test_difference():
    x = torch.tensor([1.0, -2.0])
    assert seeded.difference([x + 0.5, x], [x, x]) == 0.25
    with pytest.raises(ValueError, match=r'shapes \[\(1,\)\], expected'):
        seeded.difference([x[:1]], [x])
    for maps in ([x / 0, x], [x, x * float('nan')]):
        with pytest.raises(ValueError, match='not finite'):
            seeded.difference(maps, [x, x])


def test_training(monkeypatch, tmp_path):
    run(
        monkeypatch,
        *('training', MINI, '--size', 64, 64, '--rounds', 1),
        *('--out', tmp_path),
    )
    rows = json.loads((tmp_path / 'training.json').read_text())['rows'][:3]
    assert [row['form'] for row in rows] == [':original', '', ':with_cp']
    for row in rows:
        assert row['difference'] < 1e-4  # of loss and gradients
        # weights and both moments of AdamW
        assert row['held (MB)'] >= 3 * 4 * row['params (M)']
        assert row['memory (MB)'] > row['held (MB)']
    assert rows[2]['FLOPs (G)'] > rows[1]['FLOPs (G)']  # some twice
    ratio = rows[1]['memory (MB)'] / rows[0]['memory (MB)']
    assert rows[1]['memory, ratio'] == ratio


def test_operators(monkeypatch, tmp_path):
    monkeypatch.setattr(experiments, 'PAPER_MAPS', ((64, 6),))
    run(monkeypatch, 'operators', '--rounds', 1, '--out', tmp_path)
    rows = json.loads((tmp_path / 'operators.json').read_text())['rows']
    flops = {row['side']: round(1e9 * row['FLOPs (G)']) for row in rows}
    pconv = flops.pop('PConv, r = 1/4')
    assert pconv == 10 * 9 * 16 * 16 * 6 * 6
    assert flops.pop('regular') == 16 * pconv
    assert flops.pop('depthwise') == pconv * 4 // 16
    assert set(flops.values()) == {pconv}


def test_winograd(monkeypatch, tmp_path):
    maps = ((2, 8, 12), (1, 32, 64))
    monkeypatch.setattr(experiments, 'WINOGRAD_MAPS', maps)
    monkeypatch.setattr(experiments, 'CHANNELS', (8, 128))
    run(monkeypatch, 'winograd', '--rounds', 1, '--out', tmp_path)
    rows = json.loads((tmp_path / 'winograd.json').read_text())['rows']
    assert [row['side'] for row in rows[::2]] == ['direct'] * 4
    used = [row['side'] for row in rows[1::2]]
    assert used == ['Winograd, not used'] * 3 + ['Winograd, used']
    assert rows[0]['map'] == rows[1]['map'] == '2x8x8x12'
    transform = experiments.winograd.transform
    monkeypatch.setattr(
        experiments.winograd,
        'transform',
        lambda weight, shape: transform(1.1 * weight, shape),
    )
    with pytest.raises(ValueError, match='they differ by'):
        experiments.measure_layers(experiments.winograd_pairs, rounds=1)


def test_scaling_and_report(monkeypatch, tmp_path):
    monkeypatch.setenv('MALLOC_TRIM_THRESHOLD_', '99')
    command = ['scaling', 'fasternet-t0', '--rounds', 1, '--out', tmp_path]
    run(monkeypatch, *command, '--sizes', '64x64', '64x128', '--batches', 1, 2)
    result = json.loads((tmp_path / 'scaling.json').read_text())
    points = [(row['pixels'], row['batch']) for row in result['rows']]
    assert points == [('64x64', 1), ('64x128', 1), ('64x64', 2)]
    row = result['rows'][2]
    assert row['ns/pixel'] == pytest.approx(1e6 * row['ms'][1] / 2 / 64**2)
    result['machine']['cores'] += 1
    result['date'] = '2020-01-02'
    (tmp_path / 'other.json').write_text(json.dumps(result))
    page = tmp_path / 'page.md'
    run(monkeypatch, 'report', tmp_path, '--out', page)
    text = page.read_text()
    assert '| side | pixels | batch | ms | images/s |' in text
    for number, name in enumerate(('other', 'scaling'), 1):
        cores = result['machine']['cores'] - number + 1
        assert f'\nMachine {number}: cpu {result["machine"]["cpu"]}' in text
        assert f'; cores {cores}; ' in text
        assert f'## {name}\n\nMachine {number}, 20' in text
    assert 'Machine 1, 2020-01-02:' in text and str(tmp_path) not in text
    assert (
        '\nMALLOC_TRIM_THRESHOLD_=99 python tools/benchmark scaling '
        'fasternet-t0 --rounds 1 '
    ) in text
    assert (tmp_path / 'page_2_scaling.png').stat().st_size < 150_000
    with pytest.raises(SystemExit, match='2'):
        run(monkeypatch, 'report', tmp_path / 'none', '--out', page)


def test_goals_can_be_judged():
    """Each is of a form that is measured, and of a model that there is."""
    for goal in models.DATA['goals']:
        model = goal['model']
        assert model in models.BACKBONES or (ROOT / model).is_file()
        training = goal.get('training')
        forms = (':original', '', ':with_cp') if training else models.EVERY
        for form, what, sign, limit, *rivals in sum(goal['reach'], []):
            assert {form, *rivals} <= set(forms)
            assert (what == 'times faster') == bool(rivals)
            assert sign in experiments.OPERATORS and limit > 0


def test_judge():
    def row(form, *times, **others):
        ms = [1e3 * times[0]] * 3
        return dict(form=form, times=times, ms=ms, **others)

    rows = [
        row(':original', 6.0, 8.0),
        row(':optimize', 4.0, 4.0, difference=2e-6, operators='a profile'),
        row('@onnxruntime', 7.0, 9.0),
        row('@openvino', 5.0, 8.0),
        dict(form=':optimize,bf16', side='x', why='this CPU does not'),
        dict(form='@openvino:bf16', side='y', why='nor this'),
        dict(side='a peak', ms=[1, 1, 1]),
    ]
    goals = [
        [':optimize', 'times faster', '>=', 1.7, ':original'],
        [':optimize', 'times faster', '>=', 1.8, ':original'],
        [':optimize', 'times faster', '>=', 1.6, '@onnxruntime', '@openvino'],
        [
            ':optimize',
            'times faster',
            '>=',
            1.7,
            '@openvino:bf16',
            '@openvino',
        ],
        [':optimize', 'times faster', '>=', 1, '@openvino:bf16'],
        [':optimize,bf16', 'times faster', '>=', 1, ':original'],
        [':optimize', 'difference', '<=', 1e-5],
        [':optimize', 'difference', '<=', 1e-6],
    ]
    goal = dict(model='a/b.py', reach=[goals[:2], goals[2:]])
    judged = list(experiments.judge(goal, dict(rows=rows)))
    assert [row['reached'] for row in judged] == [
        *(True, False, True, False, False, False, True, False)
    ]
    assert [row['measured'] for row in judged] == [
        *([1.625, 1.75, 1.875], [1.625, 1.75, 1.875]),
        *([1.4375, 1.625, 1.8125], [1.4375, 1.625, 1.8125]),
        *('nor this', 'this CPU does not', 2e-6, 2e-6),
    ]
    text = report.to_markdown(dict(settings={}, rows=judged))
    assert (
        '| b:optimize | times faster >= 1.7 :original | 1.75 (1.62 to 1.88) '
        '| yes |'
    ) in text
    assert 'Not reached: b:optimize.\n\n```\na profile\n```' in text


def test_goals_command(monkeypatch, tmp_path):
    monkeypatch.setattr(models, 'EVERY', (':original', ':optimize'))
    goals = [
        dict(
            model=str(Path(MINI).relative_to(ROOT)),
            reach=[[[':optimize', 'times faster', '>=', 0.01, ':original']]],
        ),
        dict(
            model=str(Path(MINI).relative_to(ROOT)),
            training=True,
            size=[512, 512],
            reach=[[['', 'memory, ratio', '<=', 0.1]]],
        ),
    ]
    monkeypatch.setitem(experiments.DATA, 'goals', goals)
    options = ['--shrink', 99, '--rounds', 1, '--threads', 1]
    run(monkeypatch, 'goals', *options, '--out', tmp_path)
    result = json.loads((tmp_path / 'goals.json').read_text())
    reached = [row['reached'] for row in result['rows'] if 'reached' in row]
    assert reached == [True, False]
    inference, training = result['runs'].values()
    assert inference['settings']['pixels'] == '64x64'
    fast = inference['rows'][1]
    assert fast['difference'] < 1e-5 and fast['in common (%)'] >= 95
    assert result['rows'][0]['measured'] == fast['times faster']
    ratio = training['rows'][1]['memory, ratio']
    assert result['rows'][1]['measured'] == ratio
    text = (tmp_path / 'goals.md').read_text()
    assert f'memory, ratio <= 0.1 | {ratio:.3g} | no |' in text
    assert '| AP on the micrograph | INT8 within 0.5' in text


@pytest.mark.parametrize(
    'side, message',
    [
        ('fasternet-x', "'fasternet-x' is neither a config of a detector nor"),
        ('fasternet-t0:fats', 'fats is not an option of plain sides, expect'),
        ('fasternet-t0@tvm', 'expected onnxruntime or openvino'),
        ('fasternet-t0:', 'is not NAME[@RUNTIME][:option,...]'),
        ('fasternet-t0:int8', 'int8 is not an option of plain sides, expect'),
        ('fasternet-t0@openvino:fold', 'expected bf16, int8'),
        ('fasternet-t0:optimize,fold', 'expected optimize, direct, bf16'),
    ],
)
def test_one_clear_error(monkeypatch, capsys, tmp_path, side, message):
    with pytest.raises(SystemExit, match='2'):
        run(
            monkeypatch,
            *('models', side, '--size', 64, 64, '--out', tmp_path / 'new'),
        )
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith('benchmark: error: ') and message in error
    assert not (tmp_path / 'new').exists()
