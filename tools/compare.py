"""Compare backbones: train all, by one recipe, and measure.

Writes to the work directory: ``results.json``, what was measured; ``table.md``
and ``compare.png``. A run that is there already is not repeated.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any, Callable, Dict, List

import matplotlib.pyplot as plt
import torch
from get_flops import count_detector
from measuring import alternate, table
from mmdet.apis import init_detector
from mmdet.registry import DATASETS
from mmengine.config import Config, DictAction
from mmengine.dataset import pseudo_collate
from mmengine.optim import build_optim_wrapper
from mmengine.runner import set_random_seed

ROOT = Path(__file__).resolve().parents[1]
MINI = ROOT / 'configs' / 'mini'
# What is compared, by its name; after "GROUP: ", it has a table of its own.
COMPARISONS = dict(
    relatives={
        name: MINI / f'mask-rcnn_{file}_nuclei.py'
        for name, file in {
            'FasterNet-T0': 'fasternet-t0_fpn',
            'FasterNet-T0, T-shaped neck and heads': 'fasternet-t0_fpn-t',
            'FasterNet-T0, SPConv neck and heads': 'fasternet-t0_fpn-spconv',
            'GhostNet': 'ghostnet-1.0x_fpn',
            'G-Ghost RegNetX-200MF': 'g-ghost-regnetx-200MF_fpn',
            'G-Ghost RegNetX-400MF': 'g-ghost-regnetx-400MF_fpn',
            'ResNet-18': 'r18_fpn',
            'ResNet-18 + SPConv': 'r18-spconv_fpn',
            'ResNet-18 + SAConv': 'r18-saconv_fpn',
        }.items()
    },
    evidence={
        f'{data}, {detector}: {name}': MINI
        / f'{file.format(stem)}_{data.lower()}.py'
        for data, (detector, file), (name, stem) in product(
            ('craters', 'HeLa'),
            {'Mask R-CNN': 'mask-rcnn_{}_fpn', 'RTMDet': 'rtmdet_{}'}.items(),
            {
                'FasterNet-T0': 'fasternet-t0',
                'GhostNet': 'ghostnet-1.0x',
                'MobileNetV2': 'mobilenetv2',
                'ResNet-18': 'r18',
            }.items(),
        )
    },
)
METRICS = {'box AP': 'bbox', 'mask AP': 'segm'}
SIDE = 256  # of the images, as the configs resize them


def train(config: Config, folder: Path, threads: int) -> Dict[str, Any]:
    """Train and evaluate one model, or read what an earlier time gave."""
    result_path = folder / 'result.json'
    if result_path.exists():
        result = json.loads(result_path.read_text())
        if result['config'] == config.pretty_text:
            return result
    print(f'==> {folder.parent.name}, {folder.name}', flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    # Not in the folder itself: there mmengine writes one of the same name.
    path = folder / 'wanted' / 'config.py'
    path.parent.mkdir(exist_ok=True)
    config.dump(path)
    with open(folder / 'train.log', 'w') as log:
        done = subprocess.run(
            [
                *(sys.executable, ROOT / 'tools' / 'train.py', path),
                *('--work-dir', folder),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(OMP_NUM_THREADS=str(threads)),
        )
    if done.returncode:
        sys.exit(f'Training failed, see {folder}/train.log.')
    scalars = max(folder.glob('*/vis_data/scalars.json'))
    entries = [json.loads(line) for line in scalars.read_text().splitlines()]
    if 'loss' in entries[-1]:
        sys.exit(f'{scalars} holds no evaluation at its end.')
    result = dict(
        config=config.pretty_text,
        checkpoint=(folder / 'last_checkpoint').read_text(),
        iterations=entries[-1]['step'],
        # mmdet reports nothing of a model that found nothing.
        **{
            name: entries[-1].get(f'coco/{kind}_mAP', 0.0)
            for name, kind in METRICS.items()
            if kind in config.val_evaluator.metric
        },
    )
    result_path.write_text(json.dumps(result))
    return result


def take_turns(
    calls: Dict[str, Callable[[], Any]], rounds: int
) -> Dict[str, float]:
    """Time calls in milliseconds, the median of the rounds."""
    times = alternate(list(calls.values()), rounds)
    return {name: 1000 * median(series) for name, series in zip(calls, times)}


def measure_times(
    configs: Dict[str, Config], checkpoints: Dict[str, str], rounds: int
) -> Dict[str, Dict[str, float]]:
    """Time each detector on one image, and a training step on one batch."""
    models = {
        name: init_detector(config, checkpoints[name], device='cpu')
        for name, config in configs.items()
    }
    images, batches = {}, {}
    for name, cfg in configs.items():
        set_random_seed(0)  # as augmentation draws
        loaders = cfg.test_dataloader, cfg.train_dataloader
        test, train = (DATASETS.build(loader.dataset) for loader in loaders)
        images[name] = pseudo_collate([test[0]])
        batches[name] = pseudo_collate(
            [train[i] for i in range(cfg.train_dataloader.batch_size)]
        )
    with torch.no_grad():
        latencies = take_turns(
            {n: partial(m.test_step, images[n]) for n, m in models.items()},
            rounds,
        )
    steps = take_turns(
        {
            name: partial(
                model.train().train_step,
                batches[name],
                build_optim_wrapper(model, configs[name].optim_wrapper),
            )
            for name, model in models.items()
        },
        -(-rounds // 5),
    )
    return {
        name: dict(latency=latencies[name], step=steps[name])
        for name in models
    }


def spread(values: List[float]) -> str:
    """Write a mean and the extremes."""
    return f'{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})'


def by_group(results: Dict[str, Any]) -> Dict[str, Dict[str, Any]]:
    """Sort the results by their names' groups; '' is that of the others."""
    groups = {}
    for key, result in results.items():
        group, _, name = key.rpartition(': ')
        groups.setdefault(group, {})[name] = result
    return groups


def make_table(results: Dict[str, Dict[str, Any]]) -> str:
    """Write the results as tables in Markdown, one for each group."""
    parts = []
    for group, own in by_group(results).items():
        metrics = [m for m in METRICS if m in next(iter(own.values()))]
        header = [
            *('backbone', *metrics, 'params (M)', 'FLOPs (G)'),
            *('latency (ms)', 'training (min)'),
        ]
        rows = [
            [
                name,
                *(spread(result[metric]) for metric in metrics),
                f'{result["params"] / 1e6:.2f}',
                f'{result["flops"] / 1e9:.2f}',
                f'{result["latency"]:.0f}',
                f'{result["step"] * result["iterations"] / 60_000:.1f}',
            ]
            for name, result in own.items()
        ]
        title = f'{group}:\n\n' if group else ''
        parts.append(f'{title}{table(header, rows)}\n')
    return '\n'.join(parts)


def plot(results: Dict[str, Dict[str, Any]], path: Path) -> None:
    """Draw AP over latency; bars from the lowest to the highest seed."""
    panels = [
        (group, metric, own)
        for group, own in by_group(results).items()
        for metric in METRICS
        if metric in next(iter(own.values()))
    ]
    rows = -(-len(panels) // 2)
    figure, axes = plt.subplots(
        *(rows, 2),
        figsize=(10, 4.5 * rows),
        sharey='row',
        layout='constrained',
        squeeze=False,
    )
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (group, metric, own) in zip(axes.flat, panels):
        for name, result in own.items():
            aps = result[metric]
            low, high = mean(aps) - min(aps), max(aps) - mean(aps)
            axis.errorbar(
                result['latency'],
                mean(aps),
                yerr=[[low], [high]],
                fmt='o',
                capsize=4,
                label=name,
            )
        axis.margins(x=0.1)
        axis.set(xlabel='latency (ms)', ylabel=metric, xlim=(0, None))
        axis.set_title(group)
        axis.grid(alpha=0.3)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc='outside upper center',
        ncols=3,
    )
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('work_dir', type=Path)
    parser.add_argument(
        '--comparison',
        choices=COMPARISONS,
        default='relatives',
        help='of all backbones on the nuclei, or of four on two more data '
        'sets in two detectors (default: relatives)',
    )
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument(
        '--rounds',
        type=int,
        default=50,
        help='timed images per detector, and a fifth as many training steps',
    )
    parser.add_argument(
        '--jobs',
        type=int,
        default=1,
        help='models trained at once, which share the threads',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        metavar='KEY=VALUE',
        help="changes to all configs, as train.py's",
    )
    args = parser.parse_args()
    paths = COMPARISONS[args.comparison]
    configs = {}
    for name, path in paths.items():
        configs[name] = Config.fromfile(path)
        configs[name].merge_from_dict(args.cfg_options)
    for config in configs.values():
        data = Path(config.data_root)
        if not data.is_dir():
            parser.error(
                f'there is no {data}: run python -m '
                f'fasternet_det.datasets.{data.name} {data}'
            )
    for option in ('rounds', 'jobs'):
        if getattr(args, option) < 1:
            parser.error(f'--{option}: expected at least 1')

    threads = max(torch.get_num_threads() // args.jobs, 1)
    runs = []
    for name, seed in product(configs, args.seeds):
        config = copy.deepcopy(configs[name])
        config.merge_from_dict({'randomness.seed': seed})
        runs.append((config, args.work_dir / paths[name].stem / f'seed{seed}'))
    with ThreadPoolExecutor(args.jobs) as pool:
        scores = list(pool.map(lambda run: train(*run, threads), runs))
    results, checkpoints = {}, {}
    for i, (name, config) in enumerate(configs.items()):
        own = scores[i * len(args.seeds) :][: len(args.seeds)]
        params, flops = count_detector(config, (SIDE, SIDE))
        checkpoints[name] = own[0]['checkpoint']
        results[name] = dict(
            params=params,
            flops=flops,
            iterations=own[0]['iterations'],
            **{k: [score[k] for score in own] for k in METRICS if k in own[0]},
        )
    for name, times in measure_times(
        configs, checkpoints, args.rounds
    ).items():
        results[name].update(times)
    text = make_table(results)
    (args.work_dir / 'results.json').write_text(json.dumps(results, indent=1))
    (args.work_dir / 'table.md').write_text(text)
    plot(results, args.work_dir / 'compare.png')
    print(text)
    print(
        f'AP: mean, lowest and highest of the seeds {args.seeds}. '
        f'FLOPs: multiply-adds at {SIDE}x{SIDE}, 1000 proposals, 100 masks. '
        f'Latency: one image, {torch.get_num_threads()} threads, as trained. '
        'Training: the median step, times the iterations.'
    )


if __name__ == '__main__':
    main()
