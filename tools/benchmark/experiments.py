"""A function a command: its options -> settings, and the rows of a table."""

import copy
import math
import operator
import sys
from functools import partial
from itertools import accumulate, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from get_flops import count_flops
from measuring import Run, by_x, middle, ratios, time_rows, use_threads
from seeded import agreement, difference, fill
from torch.profiler import ProfilerActivity, profile

from fasternet_det.backbones.fasternet import PartialConv
from fasternet_det.deploy import winograd
from fasternet_det.deploy.memory import blocks
from fasternet_det.deploy.operators import FusedConv2d

from .models import DATA, Side, build_side, build_sides, training_side

ROOT = Path(__file__).resolve().parents[2]
# Largest difference to the first side's outputs, relative to their largest
# value, that rounding explains; other weights give about 1.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.2, torch.int8: 0.5}
# Least % of detections in common in float32: of torch's sides, of runtimes.
AGREEMENT, RIVALS = 95, 50
# (M, N, K) of the products whose fastest is called the peak.
MATMULS = ((2048, 2048, 2048), (4096, 1024, 1024), (1024, 1024, 1024))
CONV = partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)
# Paper, Table 1: channels and side of the maps, of stacks of ten layers.
PAPER_MAPS = ((96, 56), (192, 28), (384, 14), (768, 7))
# Channels, and batch and sides of maps, of detectors at 800x1216.
CHANNELS = (64, 80, 96, 128, 256, 512)
WINOGRAD_MAPS = (
    *((1, 200, 304), (1, 100, 152), (1, 50, 76), (1, 25, 38), (1, 13, 19)),
    *((1, 7, 10), (100, 14, 14)),
)
OPERATORS = {'<=': operator.le, '>=': operator.ge}
SCALING = 'side pixels batch ms images/s megapixels ns/pixel'.split()
SIZES = ((224, 224), (320, 480), (480, 736), (640, 960), (800, 1216))


def matmul_peak(dtype: torch.dtype) -> Tuple[str, Run, int]:
    """The fastest way to multiply matrices: its name, the function, and its
    floating-point operations, two per multiply-add.
    """
    ways = {}
    for m, n, k in MATMULS:
        a, b = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
        # The same product by oneDNN, which torch takes for 1x1 convolutions
        # in one thread only from 16 images on.
        x = a.view(16, 1, m // 16, k).permute(0, 3, 1, 2)
        weight = b[:, :, None, None].to(memory_format=torch.channels_last)
        for way, run in {
            'torch.mm': partial(torch.mm, a, b.t().contiguous()),
            'F.linear': partial(F.linear, a, b),
            '1x1 F.conv2d': partial(F.conv2d, x, weight),
        }.items():
            name = f'{dtype} peak, {way}, {m}x{n}x{k}'
            ways[name] = name, run, 2 * m * n * k
    rows = time_rows({name: run for name, run, _ in ways.values()}, 5)
    best = max(rows, key=lambda row: ways[row['side']][2] / min(row['times']))
    return ways[best['side']]


def profiled(run: Run) -> Tuple[int, str]:
    """Bytes that torch's allocator holds at most, beyond what it held before,
    of every allocation and release; and a table of the slowest operators.
    """
    run()
    blocks.clear()  # what it keeps counts
    cpu = [ProfilerActivity.CPU]
    with profile(activities=cpu, profile_memory=True, record_shapes=True) as p:
        result = run()
    events = p.profiler.kineto_results.events()
    del result
    changes = sorted(
        (event.start_ns(), i, event.nbytes())
        for i, event in enumerate(events)
        if event.name() == '[memory]'
    )
    peak = max(accumulate((nbytes for *_, nbytes in changes), initial=0))
    operators = p.key_averages(group_by_input_shape=True)
    return peak, operators.table('self_cpu_time_total', row_limit=8)


def compare(sides: Sequence[Side]) -> List[Dict[str, Any]]:
    """Compare maps and detections with those of each model's first side."""
    rows, firsts = [], {}
    for side in sides:
        outputs = side.maps(), side.found()
        pairs = zip(outputs, firsts.setdefault(side.model.name, outputs))
        try:
            rows.append(check(side, *pairs))
        except ValueError as error:
            raise ValueError(f'{side.label} {error}') from error
    return rows


def check(side: Side, maps: Any, found: Any) -> Dict[str, Any]:
    """Compare pairs of a side's outputs and of the first's."""
    row, dtype = {}, side.spec.dtype
    least = RIVALS if side.module is None else AGREEMENT
    if maps[0] is not None and maps[1] is not None:
        row['difference'] = off = difference(*maps)
        if off > TOLERANCES[dtype]:
            raise ValueError(
                'does not compute what the first side of its model does: its '
                f'maps differ by {off:.2g} of the largest value, more than '
                f'{TOLERANCES[dtype]:g}, which {dtype} would explain'
            )
    if found[0]:
        row['detections'] = [len(result) for result in found[0]]
        row['in common (%)'] = common = 100 * min(map(agreement, *found))
        if dtype == torch.float32 and common < least:
            raise ValueError(
                f'finds {row["detections"]} objects, of which {common:.0f}% '
                f'are those of the first side of its model; expected {least}%'
            )
    return row


def measure(
    sides: Sequence[str],
    size: Sequence[int] = (800, 1216),
    batch: int = 1,
    threads: int = 0,
    rounds: int = 20,
    checkpoint: str = '',
    training: bool = False,
    with_profile: bool = True,
) -> Dict[str, Any]:
    """Compare sides, and time them by turns."""
    print('Measuring', *sides, file=sys.stderr)
    settings = dict(pixels=by_x(size), batch=batch, rounds=rounds)
    settings['threads'] = use_threads(threads)
    settings['weights'] = Path(checkpoint).name or 'seeded'
    with torch.set_grad_enabled(training), TemporaryDirectory() as folder:
        make = partial(build_side, folder=Path(folder))
        make = training_side if training else make
        built, missing = build_sides(sides, make, size, batch, checkpoint)
        checked = compare(built)
        # The peaks take their turns too: clocks drift.
        dtypes = dict.fromkeys(side.spec.dtype for side in built)
        peaks = {d: matmul_peak(d) for d in dtypes if d.is_floating_point}
        runs = {side.label: side.run for side in built}
        runs |= {name: run for name, run, _ in peaks.values()}
        rows = {row['side']: row for row in time_rows(runs, rounds)}
        for name, _, operations in peaks.values():
            rows[name].pop('times faster')
            rows[name]['GFLOP/s'] = operations / 1e6 / rows[name]['ms'][1]
        for side, outputs in zip(built, checked):
            row, model = rows[side.label], side.model
            row['form'] = side.spec.form
            row['images/s'] = 1e3 * batch / row['ms'][1]
            parameters = model.module.parameters()
            row['params (M)'] = sum(p.numel() for p in parameters) / 1e6
            flops = count_flops(side.run) if training else model.flops
            row['FLOPs (G)'] = flops / 1e9
            row['GFLOP/s'] = 2 * flops / 1e6 / row['ms'][1]
            row['top-1 (%), reported'] = DATA['reported'].get(model.name)
            if side.spec.dtype in peaks:
                name, _, operations = peaks[side.spec.dtype]
                share = ratios(rows[name]['times'], row['times'])[1]
                row['of peak (%)'] = 100 * share * 2 * flops / operations
            if side.module is not None and with_profile:
                memory, row['operators'] = profiled(side.run)
                row['memory (MB)'] = (memory + side.held()) / 1e6
                row['held (MB)'] = side.held() / 1e6 or None
            row |= outputs
    return dict(settings=settings, rows=[*rows.values(), *missing])


def measure_scaling(
    sides: Sequence[str],
    sizes: Sequence[Sequence[int]] = SIZES,
    batches: Sequence[int] = (1, 2, 4, 8, 16),
    **settings: Any,
) -> Dict[str, Any]:
    """Time sides as images grow, and then as the batch of the first size."""
    points = [(size, 1) for size in sizes]
    points += [(sizes[0], batch) for batch in batches if batch > 1]
    rows = []
    for size, batch in points:
        result = measure(sides, size, batch, with_profile=False, **settings)
        for row in result['rows']:
            if 'images/s' in row:
                row |= dict(pixels=by_x(size), batch=batch)
                row['megapixels'] = batch * math.prod(size) / 1e6
                row['ns/pixel'] = row['ms'][1] / row['megapixels']
                rows.append({key: row[key] for key in SCALING})
    settings = {k: result['settings'][k] for k in ('threads', 'rounds')}
    return dict(settings=settings, rows=rows)


def measure_training(
    config: str,
    size: Sequence[int] = (512, 512),
    batch: int = 2,
    **settings: Any,
) -> Dict[str, Any]:
    """Time a detector's training step, and its memory: with the original's
    blocks, with ours, and with ours recomputed.
    """
    sides = [config + form for form in (':original', '', ':with_cp')]
    result = measure(sides, size, batch, training=True, **settings)
    original, *_ = result['rows']
    for row in result['rows'][:3]:
        row['memory, ratio'] = row['memory (MB)'] / original['memory (MB)']
    return result


def paper_stacks(batch: int = 1) -> Iterator[Dict[str, Run]]:
    """The operators of the paper's Table 1, in its stacks of ten.

    The group convolution has as many FLOPs as the PConv, C^2 / 16; so have
    the regular one of C / 4 channels and the depthwise one of C^2 / 16, which
    the paper's text has in mind when it widens networks with such layers.
    """
    for channels, side in PAPER_MAPS:
        quarter, wide = channels // 4, channels**2 // 16
        layers = {
            'PConv, r = 1/4': (channels, PartialConv(channels)),
            'regular': (channels, CONV(channels, channels)),
            'regular, C / 4': (quarter, CONV(quarter, quarter)),
            'group, 16 groups': (
                channels,
                CONV(channels, channels, groups=16),
            ),
            'depthwise': (channels, CONV(channels, channels, groups=channels)),
            'depthwise, C^2 / 16': (wide, CONV(wide, wide, groups=wide)),
        }
        yield {
            name: partial(
                fill(nn.Sequential(*map(copy.deepcopy, [layer] * 10))),
                torch.randn(batch, width, side, side),
            )
            for name, (width, layer) in layers.items()
        }


def winograd_pairs() -> Iterator[Dict[str, Run]]:
    """3x3 convolutions with ReLU, by oneDNN's direct way and by Winograd's
    tiles, whether the fast form takes these or not.
    """
    for channels, (batch, *size) in product(CHANNELS, WINOGRAD_MAPS):
        layer = fill(CONV(channels, channels))
        direct = FusedConv2d(layer, nn.ReLU(inplace=True))
        direct.winograd = False
        x = torch.randn(batch, channels, *size)
        x = x.to(memory_format=torch.channels_last)
        filters = winograd.transform(layer.weight, x.shape)
        tiles = partial(
            winograd.convolve, x, filters, layer.bias, direct.activation
        )
        error = difference([tiles()], [direct(x)])
        if error > 1e-5:
            raise ValueError(f'{x.shape}: they differ by {error:.1e}')
        used = 'used' if winograd.wins(x.shape, channels) else 'not used'
        yield {'direct': partial(direct, x), f'Winograd, {used}': tiles}


@torch.no_grad()
def measure_layers(
    cases: Callable[..., Iterator[Dict[str, Run]]],
    threads: int = 0,
    rounds: int = 20,
    **options: int,
) -> Dict[str, Any]:
    """Time layers, in turns with the others on a map."""
    threads, rows = use_threads(threads), []
    for runs in cases(**options):
        for row, run in zip(time_rows(runs, rounds), runs.values()):
            row['map'] = by_x(run.args[0].shape)
            flops = count_flops(run)
            if flops:  # fused operators go uncounted
                row['FLOPs (G)'] = flops / 1e9
                row['GFLOP/s'] = 2 * flops / 1e6 / row['ms'][1]
            rows.append(row)
    settings = dict(threads=threads, rounds=rounds, **options)
    return dict(settings=settings, rows=rows)


def judge(goal: Dict[str, Any], run: Dict[str, Any]) -> Iterator[dict]:
    """Rows of the table of goals that a run answers; see ``data.yml``."""
    rows = {row['form']: row for row in run['rows'] if 'form' in row}
    for form, what, sign, limit, *rivals in sum(goal['reach'], []):
        row, others = rows[form], [rows[rival] for rival in rivals]
        timed = [other for other in others if 'ms' in other]
        if 'ms' not in row or (rivals and not timed):
            value = next(r['why'] for r in (row, *others) if 'why' in r)
            reached = False
        else:
            value = row.get(what)
            if rivals:
                best = min(timed, key=lambda other: other['ms'][1])
                value = ratios(best['times'], row['times'])
            reached = OPERATORS[sign](middle(value), limit)
        yield dict(
            goal=Path(goal['model']).stem + form,
            reach=' '.join([what, sign, str(limit), *rivals]),
            measured=value,
            reached=reached,
            operators=row.get('operators'),
        )


def measure_goals(
    threads: int = 0, rounds: int = 20, shrink: int = 1
) -> Dict[str, Any]:
    """Measure what this project wants to reach."""
    rows, runs = [], {}
    for goal in DATA['goals']:
        model = goal['model']
        size = [max(64, n // shrink) for n in goal.get('size', (800, 1216))]
        settings = dict(threads=goal.get('threads', threads), rounds=rounds)
        path = str(ROOT / model) if model.endswith('.py') else model
        training = goal.get('training', False)
        if training:
            run = measure_training(path, size, **settings)
        else:
            run = measure([f'{path}:every'], size, **settings)
        runs[Path(model).stem + ', training' * training] = run
        rows += judge(goal, run)
    rows += DATA['elsewhere']
    return dict(settings=dict(shrink=shrink), rows=rows, runs=runs)


COMMANDS = {  # with their options
    'models': (measure, 'sides --size --batch --checkpoint'),
    'scaling': (measure_scaling, 'sides --sizes --batches --checkpoint'),
    'operators': (partial(measure_layers, paper_stacks), '--batch'),
    'winograd': (partial(measure_layers, winograd_pairs), ''),
    'training': (measure_training, 'config --size --batch'),
    'goals': (measure_goals, '--shrink'),
}
