"""Tables, plots and pages of what tools/benchmark.py measured."""

import json
import os
import platform
import re
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from benchmark_models import TIMM  # noqa: E402
from matplotlib.ticker import LogLocator, NullFormatter  # noqa: E402
from mmengine.utils import get_installed_path  # noqa: E402

PACKAGES = (
    'torch',
    'mmcv',
    'mmdet',
    'onnxruntime',
    'openvino',
    'timm',
    'numpy',
)
INSTRUCTIONS = (
    'avx2',
    'avx512f',
    'avx512_vnni',
    'avx512_bf16',
    'avx_vnni',
    'amx_tile',
    'amx_bf16',
    'amx_int8',
    'asimd',
    'i8mm',
    'bf16',
    'sve',
)
# ImageNet top-1 in percent, as reported: by FasterNet's paper, by G-Ghost's
# and SPConv's code.
REPORTED_TOP1 = {
    'fasternet-t0': 71.9,
    'fasternet-t1': 76.2,
    'fasternet-t2': 78.9,
    'fasternet-s': 81.3,
    'fasternet-m': 83.0,
    'fasternet-l': 83.5,
    'resnet-50': 78.8,
    'g-ghost-032': 77.8,
    'g-ghost-040': 78.6,
    'g-ghost-080': 79.0,
    'g-ghost-160': 79.9,
    'resnet-50-spconv': 76.26,
}
PRECISIONS = {'float32': 'o', 'bfloat16': 's', 'int8': '^'}
TAB20 = plt.get_cmap('tab20').colors
COLOURS = TAB20[::2] + TAB20[1::2]  # dark ones first
PNG = dict(dpi=100, metadata={'Software': None})


def reported(name: str, config: Optional[str]) -> Optional[float]:
    """What is reported of a model, not measured here.

    Returns:
        float | None: ImageNet top-1 of a backbone in percent; box AP of a
        detector, 0 to 100, by the metafile beside its config.
    """
    if config is None:
        return REPORTED_TOP1.get(name.replace('timm-', ''))
    mmdet = f'{get_installed_path("mmdet")}/.mim/configs/'
    metafile = Path(config.replace('mmdet::', mmdet)).parent / 'metafile.yml'
    if not metafile.is_file():
        return None
    for model in yaml.safe_load(metafile.read_text())['Models']:
        if model['Name'] == name:
            for result in model.get('Results') or []:
                if result['Task'] == 'Object Detection':
                    return result['Metrics']['box AP']
    return None


def _line(path: str, pattern: str) -> Optional[str]:
    """First match of a pattern in a file of the kernel's, where there is."""
    if not Path(path).is_file():
        return None
    match = re.search(pattern, Path(path).read_text(), re.MULTILINE)
    return match and match[1]


def describe_machine() -> Dict[str, Any]:
    """Describe the machine and what runs on it."""
    cpuinfo = '/proc/cpuinfo'
    flags = _line(cpuinfo, r'^(?:flags|Features)\s*: (.*)') or ''
    caches = {}
    for cache in sorted(Path('/sys/devices/system/cpu/cpu0/cache').glob('i*')):
        level, kind, size = (
            (cache / key).read_text().strip()
            for key in ('level', 'type', 'size')
        )
        if kind != 'Instruction':
            caches[f'L{level}'] = size
    installed = {
        found.metadata['Name']: found.version
        for found in distributions(path=[str(TIMM), *sys.path])
    }
    return dict(
        cpu=_line(cpuinfo, r'^model name\s*: (.*)') or platform.processor(),
        family=_line(cpuinfo, r'^cpu family\s*: (.*)'),
        model=_line(cpuinfo, r'^model\s*: (.*)'),
        cores=len(os.sched_getaffinity(0)),
        caches=caches,
        memory=os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'),
        instructions=[f for f in INSTRUCTIONS if f in flags.split()],
        torch_capability=torch.backends.cpu.get_cpu_capability(),
        system=f'{platform.system()} '
        + '.'.join(platform.release().split('.')[:2]),
        python=platform.python_version(),
        versions={package: installed.get(package) for package in PACKAGES},
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ['---'] + ['---:'] * (len(header) - 1), *rows]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def _ms(seconds: Sequence[float]) -> str:
    low, median, high = (1e3 * value for value in seconds)
    digits = 1 if median < 100 else 0
    return f'{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})'


def _x(quartiles: Sequence[float]) -> str:
    low, median, high = quartiles
    return f'{median:.2f} ({low:.2f} to {high:.2f})'


def _or_dash(value: Any, form: Callable[[Any], str]) -> str:
    return '-' if value is None else form(value)


def _settings(result: Dict[str, Any]) -> str:
    size = '{}x{} pixels, '.format(*result['size']) if 'size' in result else ''
    return (
        f'{size}batch {result["batch"]}, {result["threads"]} threads, '
        f'{result["rounds"]} rounds; medians, quartiles in brackets.'
    )


def _models(result: Dict[str, Any]) -> str:
    detectors = result['detectors']
    header = [
        'side',
        'ms',
        'times faster',
        'images/s',
        'params (M)',
        'FLOPs (G)',
        'GFLOP/s',
        'of peak',
        'memory (MB)',
        'difference',
    ]
    header += ['detections', 'in common'] * detectors
    rows = []
    for row in result['rows']:
        cells = [
            row['label'],
            _ms(row['seconds']),
            _x(row['ratio']),
            f'{row["images_per_second"]:.2f}',
            f'{row["params"] / 1e6:.2f}',
            f'{row["flops"] / 1e9:.2f}',
            f'{row["flop_per_second"] / 1e9:.0f}',
            _or_dash(row['peak_share'], '{:.0%}'.format),
            _or_dash(row['peak_memory'], lambda n: f'{n / 1e6:.0f}'),
            _or_dash(row['difference'], '{:.1e}'.format),
        ]
        if detectors:
            cells += [
                ', '.join(map(str, row['detections'])) or '-',
                _or_dash(row['agreement'], '{:.0%}'.format),
            ]
        rows.append(cells)
    notes = [
        f'{precision} peak: {peak["median"] / 1e9:.0f} GFLOP/s (median of '
        f'the rounds; best {peak["best"] / 1e9:.0f}) by {peak["way"]}.'
        for precision, peak in result['peaks'].items()
    ]
    bandwidth = result['bandwidth']
    notes += [
        f'Memory bandwidth: {bandwidth["bytes_per_second"] / 1e9:.1f} GB/s '
        f'by {bandwidth["way"]}.',
        'FLOPs are multiply-adds of convolutions and matrix products, GFLOP/s '
        'two each; of peak: the median of the rounds. Memory: the most that '
        "torch's allocator held beyond the weights. Difference: of the maps, "
        'to those of the first side of the model, of the largest value.',
    ]
    if detectors:
        notes.append(
            'Seeded weights, with the score threshold at which 1000 boxes an '
            "image pass into NMS; maps are the neck's. In common: the share "
            'of detections of one label, IoU 0.95, score within 1% and 99% '
            "of the mask's pixels. RTMDet's boxes reach 4 strides around "
            'their points on average: of seeded ones around 0, its head '
            'drops those that end before they start, which were all of some '
            'models.'
            if result['checkpoint'] is None
            else f'Weights: {Path(result["checkpoint"]).name}.'
        )
    return '\n\n'.join([_settings(result), table(header, rows), *notes])


def _scaling(result: Dict[str, Any]) -> str:
    points = result['points']
    header = ['side'] + [
        '{}x{}'.format(*p['size']) + f', batch {p["batch"]}' for p in points
    ]
    pixels = [p['size'][0] * p['size'][1] * p['batch'] for p in points]
    rows, relative = [], []
    for i, row in enumerate(points[0]['rows']):
        seconds = [point['rows'][i]['seconds'][1] for point in points]
        per_pixel = [s / n for s, n in zip(seconds, pixels)]
        rows.append([row['label'], *(f'{1e3 * s:.1f}' for s in seconds)])
        relative.append(
            [row['label'], *(f'{p / per_pixel[0]:.2f}' for p in per_pixel)]
        )
    first = points[0]
    return '\n\n'.join(
        [
            f'{first["threads"]} threads, {first["rounds"]} rounds. Medians '
            'in ms:',
            table(header, rows),
            'Time per pixel, against the first column:',
            table(header, relative),
        ]
    )


def _operators(result: Dict[str, Any]) -> str:
    rows = [
        [
            row['operator'],
            '{}x{}x{}'.format(*row['map']),
            f'{row["flops"] / 1e6:.1f}',
            _ms(row['seconds']),
            _x(row['ratio']),
            f'{row["flops_per_second"] / 1e9:.1f}',
        ]
        for row in result['rows']
    ]
    return '\n\n'.join(
        [
            f'Stacks of {result["layers"]} layers of 3x3, float32, NCHW, '
            + _settings(result),
            table(
                [
                    'operator',
                    'map',
                    'FLOPs (M)',
                    'ms',
                    'times as fast as PConv',
                    'GFLOPS',
                ],
                rows,
            ),
            'FLOPs and FLOPS in multiply-adds, as in the paper.',
        ]
    )


def _winograd(result: Dict[str, Any]) -> str:
    rows = [
        [
            'x'.join(map(str, row['map'])),
            _ms(row['direct']),
            _ms(row['winograd']),
            _x(row['ratio']),
            f'{row["difference"]:.1e}',
            'yes' if row['used'] else 'no',
        ]
        for row in result['rows']
    ]
    header = ['map', 'direct, ms', 'Winograd, ms', 'times faster']
    return '\n\n'.join(
        [
            'As many channels in as out, ReLU, float32, '
            f'{result["threads"]} threads, {result["rounds"]} rounds; '
            'medians, quartiles in brackets. Used: in the fast form.',
            table([*header, 'difference', 'used'], rows),
        ]
    )


def _training(result: Dict[str, Any]) -> str:
    rows = [
        [
            row['side'],
            _ms(row['seconds']),
            _x(row['ratio']),
            f'{row["peak_memory"] / 1e6:.0f}',
            f'{row["memory_ratio"]:.2f}',
            f'{row["beyond_ratio"]:.2f}',
            f'{row["loss"]:.6g}',
            f'{row["difference"]:.1e}',
        ]
        for row in result['rows']
    ]
    held = result['rows'][0]['held']
    return '\n\n'.join(
        [
            f'{result["config"]}, forward, backward and update, float32, '
            + _settings(result),
            table(
                [
                    'blocks',
                    'ms',
                    'times faster',
                    'peak memory (MB)',
                    'ratio',
                    'ratio beyond what is held',
                    'loss',
                    'difference',
                ],
                rows,
            ),
            "Peak memory: all that torch's allocator held at most, with "
            f'weights and optimizer state, {held / 1e6:.0f} MB of it between '
            'steps. Difference: of the gradients.',
        ]
    )


def _top(operators: Sequence[Dict[str, Any]]) -> str:
    """A table of operators, by their own share of the time."""
    return table(
        ['operator', 'inputs', 'calls', 'ms', 'share'],
        [
            [
                f'`{op["name"]}`',
                ', '.join('x'.join(map(str, s)) for s in op['shapes'][:2]),
                str(op['calls']),
                f'{1e3 * op["seconds"]:.1f}',
                f'{op["share"]:.0%}',
            ]
            for op in operators[:8]
        ],
    )


def _goals(result: Dict[str, Any]) -> str:
    rows = [
        [
            row['goal'],
            row['target'],
            row['value'],
            'yes' if row['reached'] else 'no',
        ]
        for row in result['rows']
    ]
    parts = [table(['goal', 'reach', 'measured', 'reached'], rows)]
    held: Dict[str, List[str]] = {}
    for row in result['rows']:
        if not row['reached'] and row['operators']:
            held.setdefault(_top(row['operators']), []).append(row['goal'])
    for top, names in held.items():
        parts += [f'Not reached: {"; ".join(names)}. Its profile:', top]
    for name, run in result['runs'].items():
        parts += [f'#### {name}', to_markdown(run)]
    return '\n\n'.join(parts)


FORMS = dict(
    models=_models,
    scaling=_scaling,
    operators=_operators,
    winograd=_winograd,
    training=_training,
    goals=_goals,
)


def to_markdown(result: Dict[str, Any]) -> str:
    """The tables of a result."""
    return FORMS[result['kind']](result)


def _log(axes: Any, names: str) -> None:
    """Make the x or y axis, or both, logarithmic, with plain numbers."""
    axes.set(**{f'{name}scale': 'log' for name in names})
    for name in names:
        axis = getattr(axes, f'{name}axis')
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter('{x:g}')
        axis.set_minor_formatter(NullFormatter())


def _plot_models(result: Dict[str, Any], path: Path) -> None:
    """Latency against FLOPs, against what is reported, and the roofline."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.5), layout='constrained')
    latency, accuracy, roofs = axes
    if not any(row['reported'] for row in result['rows']):
        accuracy.remove()
    bandwidth = result['bandwidth']['bytes_per_second'] / 1e9
    far = 1000
    for i, row in enumerate(result['rows']):
        style = dict(
            color=COLOURS[i % 20], marker=PRECISIONS[row['precision']], ls=''
        )
        ms = 1e3 * row['seconds'][1]
        latency.plot(row['flops'] / 1e9, ms, **style, label=row['label'])
        if row['reported']:
            accuracy.plot(row['reported'], ms, **style)
        if row['traffic']:
            intensity = 2 * row['flops'] / row['traffic']
            far = max(far, 2 * intensity)
            roofs.plot(intensity, row['flop_per_second'] / 1e9, **style)
    for precision, dashes in zip(result['peaks'], ('-', '--')):
        peak = result['peaks'][precision]['median'] / 1e9
        roofs.plot(
            [1, peak / bandwidth, far],
            [bandwidth, peak, peak],
            f'k{dashes}',
            label=f'memory, and {precision} peak',
        )
    latency.set(xlabel='FLOPs (G multiply-adds)', ylabel='latency (ms)')
    accuracy.set(
        xlabel='COCO box AP, reported'
        if result['detectors']
        else 'ImageNet top-1 (%), reported',
        ylabel='latency (ms)',
    )
    roofs.set(
        xlabel='FLOP per byte that operators read and write',
        ylabel='GFLOP/s',
    )
    _log(latency, 'xy')
    _log(accuracy, 'y')
    _log(roofs, 'xy')
    figure.legend(loc='outside lower center', ncols=4, fontsize=7)
    figure.savefig(path, **PNG)
    plt.close(figure)


def _plot_scaling(result: Dict[str, Any], path: Path) -> None:
    """Time against pixels, and images a second against the batch."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout='constrained')
    points = result['points']
    single = [p for p in points if p['batch'] == 1]
    batched = [p for p in points if p['size'] == points[0]['size']]
    for i, row in enumerate(points[0]['rows']):
        axes[0].plot(
            [p['size'][0] * p['size'][1] / 1e6 for p in single],
            [1e3 * p['rows'][i]['seconds'][1] for p in single],
            'o-',
            label=row['label'],
        )
        axes[1].plot(
            [p['batch'] for p in batched],
            [p['rows'][i]['images_per_second'] for p in batched],
            'o-',
        )
    axes[0].set(xlabel='megapixels, batch 1', ylabel='latency (ms)')
    _log(axes[0], 'xy')
    axes[1].set(
        xlabel='batch, {}x{} pixels'.format(*points[0]['size']),
        ylabel='images per second',
        ylim=(0, None),
    )
    axes[0].legend(fontsize=7)
    figure.savefig(path, **PNG)
    plt.close(figure)


PLOTS = dict(models=_plot_models, scaling=_plot_scaling)


def write(result: Dict[str, Any], folder: Path, name: str) -> List[Path]:
    """Write JSON, Markdown and, where there is one, a plot.

    Returns:
        list[Path]: The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f'{name}.json', folder / f'{name}.md']
    files[0].write_text(json.dumps(result, indent=1) + '\n')
    files[1].write_text(to_markdown(result) + '\n')
    if result['kind'] in PLOTS:
        files.append(folder / f'{name}.png')
        PLOTS[result['kind']](result, files[-1])
    return files


def _machine(machine: Dict[str, Any]) -> str:
    caches = ', '.join(f'{k} {v}' for k, v in machine['caches'].items())
    versions = ', '.join(
        f'{k} {v}' for k, v in machine['versions'].items() if v
    )
    return '\n'.join(
        [
            f'- CPU: {machine["cpu"]} (family {machine["family"]}, model '
            f'{machine["model"]}), {machine["cores"]} cores, {caches} (a '
            "core's own, the last shared)",
            f'- instructions: {", ".join(machine["instructions"])}; torch '
            f'uses {machine["torch_capability"]}',
            f'- memory: {machine["memory"] / 2**30:.0f} GiB',
            f'- {machine["system"]}, Python {machine["python"]}, {versions}',
        ]
    )


def page(results: Dict[str, Dict[str, Any]], out: Path) -> None:
    """Make one page of results, with its plots beside it.

    Args:
        results (dict[str, dict]): Results by name.
        out (Path): The page, ending in .md.

    Raises:
        ValueError: If the results are of different machines.
    """
    machines = [result['machine'] for result in results.values()]
    if any(machine != machines[0] for machine in machines):
        raise ValueError(
            'the results are of different machines or versions: make a page '
            'of each'
        )
    parts = [
        '# Benchmark',
        'Made by `tools/benchmark.py report`; every number below was measured '
        'on one machine, but for accuracies, which are as reported. Times '
        'are of this machine: compare ratios.',
        _machine(machines[0]),
    ]
    for name, result in results.items():
        parts += [
            f'## {name}',
            f'```bash\n{result["command"]}\n```',
            to_markdown(result),
        ]
        if result['kind'] in PLOTS:
            png = out.with_name(f'{out.stem}_{name}.png')
            PLOTS[result['kind']](result, png)
            parts.append(f'![{name}]({png.name})')
    out.write_text('\n\n'.join(parts) + '\n')
