"""How results are shown: as JSON, Markdown, plots and a page."""

import json
from pathlib import Path
from typing import Any, Dict, List, Sequence

import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter
from measuring import cell, middle, name_machine, table

HIDDEN = ('times', 'form', 'operators')  # columns of the JSON alone
# What is plotted of which command's rows.
PANELS = {
    'models': (('FLOPs (G)', 'ms'), ('top-1 (%), reported', 'ms')),
    'scaling': (('megapixels', 'ns/pixel'),),
}
NOTES = """\
Medians, quartiles in brackets; times faster: than the first, round by round.
Seeded: with the score threshold at which 1000 boxes an image pass into NMS.
FLOPs: multiply-adds of convolutions and matrix products; GFLOP/s: two each, of
which Winograd's convolution needs less: it can be above the peak.
Memory: the most that torch's allocator held beyond what it held before; of
training, with weights and optimizer state. Difference: of the maps, or of loss
and gradients, to those of the first side of the model, of the largest value.
In common: the share of detections of one label, IoU 0.95, score within 1% and
99% of the mask's pixels."""


def to_markdown(result: Dict[str, Any]) -> str:
    """The tables of a result, and the profiles of goals not reached."""
    rows = [row for row in result['rows'] if 'why' not in row]
    keys = [
        key
        for key in dict.fromkeys(key for row in rows for key in row)
        if key not in HIDDEN and any(row.get(key) is not None for row in rows)
    ]
    lines = [[cell(row.get(key)) for key in keys] for row in rows]
    parts = [cell(result['settings']), table(keys, lines)]
    parts += [
        f'Left out: {row["side"]}: {row["why"]}.'
        for row in result['rows']
        if 'why' in row
    ]
    profiles: Dict[str, List[str]] = {}
    for row in rows:
        if row.get('reached') is False and row['operators']:
            profiles.setdefault(row['operators'], []).append(row['goal'])
    for profile, goals in profiles.items():
        parts.append(f'Not reached: {", ".join(dict.fromkeys(goals))}.')
        parts.append(f'```\n{profile}\n```')
    for name, part in result.get('runs', {}).items():
        parts += [f'#### {name}', to_markdown(part)]
    return '\n\n'.join(parts)


def plot(result: Dict[str, Any], path: Path) -> None:
    """Plot the panels of a command, a colour a side."""
    rows = result['rows']
    panels = [
        (x, y)
        for x, y in PANELS[result['kind']]
        if any(row.get(x) for row in rows)
    ]
    figure, axes = plt.subplots(
        ncols=len(panels),
        figsize=(6 * len(panels), 4.5),
        layout='constrained',
        squeeze=False,
    )
    colours = plt.get_cmap('tab20').colors
    for axis, (x, y) in zip(axes[0], panels):
        for i, side in enumerate(dict.fromkeys(row['side'] for row in rows)):
            points = [
                (row[x], middle(row[y]))
                for row in rows
                if row['side'] == side and row.get(x)
            ]
            if points:
                axis.scatter(*zip(*points), color=colours[i % 20], label=side)
        linear = x.endswith('reported')
        axis.set(xlabel=x, ylabel=y, yscale='log')
        axis.set(xscale='linear' if linear else 'log')
        for ticks in (axis.yaxis,) if linear else (axis.xaxis, axis.yaxis):
            ticks.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ticks.set_major_formatter('{x:g}')
            ticks.set_minor_formatter(NullFormatter())
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc='outside lower center', ncols=4, fontsize=7)
    figure.savefig(path, dpi=100, metadata={'Software': None})
    plt.close(figure)


def write(result: Dict[str, Any], path: Path) -> None:
    """Write JSON, Markdown and, where there is one, a plot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix('.json').write_text(json.dumps(result, indent=1) + '\n')
    path.with_suffix('.md').write_text(to_markdown(result) + '\n')
    if result['kind'] in PANELS:
        plot(result, path.with_suffix('.png'))


def report(folders: Sequence[Path], out: Path) -> None:
    """Make one page of the results in some folders, its plots beside it."""
    files = [file for folder in folders for file in folder.glob('*.json')]
    if not files:
        raise ValueError(f'there is no .json in {cell(folders)}')
    machines: List[str] = []
    sections = []
    for file in sorted(files, key=lambda file: file.stem):
        result = json.loads(file.read_text())
        machine = name_machine(result['machine'])
        if machine not in machines:
            machines.append(machine)
        number = machines.index(machine) + 1
        sections += [
            f'## {file.stem}',
            f'Machine {number}, {result["date"]}:',
            f'```bash\n{result["command"]}\n```',
            to_markdown(result),
        ]
        if result['kind'] in PANELS:
            png = out.with_name(f'{out.stem}_{number}_{file.stem}.png')
            plot(result, png)
            sections.append(f'![{file.stem}]({png.name})')
    head = [
        '# Benchmark',
        'Made by `python tools/benchmark report`. All was measured, but for '
        'what is called reported. Compare times within a section only.',
        *(f'Machine {i}: {line}' for i, line in enumerate(machines, 1)),
        NOTES,
    ]
    out.write_text('\n\n'.join(head + sections) + '\n')
