"""Report a run of train.py and test.py: a table, curves and pictures.

Writes to the work directory: ``curves.png``, loss and AP over time, and
``pictures``, ground truth (left) beside predictions (right).
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Dict, List

import cv2
import matplotlib.pyplot as plt
import torch
from mmdet.apis import init_detector
from mmdet.registry import DATASETS
from mmdet.visualization import DetLocalVisualizer
from mmengine.runner import find_latest_checkpoint
from rich import print
from rich.table import Table

METRICS = {'box': 'coco/bbox_mAP', 'mask': 'coco/segm_mAP'}
ZOOM = 4  # small tiles are drawn this many times larger


def newest(folder: Path, pattern: str) -> Path:
    """The newest of the files that mmengine names by time."""
    paths = sorted(folder.glob(pattern))
    if not paths:
        sys.exit(f'There is no {pattern} in {folder}: train and test first.')
    return paths[-1]


def plot_curves(scalars: List[Dict[str, float]], path: Path) -> None:
    """Draw loss and AP over iterations."""
    figure, left = plt.subplots(figsize=(7, 4), layout='constrained')
    right = left.twinx()
    for axis, key, label, style in (
        (left, 'loss', 'loss', 'k'),
        *((right, key, f'{name} AP', 'o-') for name, key in METRICS.items()),
    ):
        points = [(s['step'], s[key]) for s in scalars if key in s]
        if points:
            axis.plot(*zip(*points), style, label=label)
    left.set(xlabel='iteration', ylabel='training loss', ylim=(0, None))
    right.set(ylabel='AP on the validation images', ylim=(0, 1))
    figure.legend(loc='outside upper center', ncols=3)
    figure.savefig(path, dpi=120)


@torch.no_grad()
def draw_pictures(config: Path, checkpoint: str, folder: Path) -> None:
    """Draw what the model finds on the test images beside the truth."""
    model = init_detector(config, checkpoint, device='cpu')
    dataset = DATASETS.build(model.cfg.test_dataloader.dataset)
    visualizer = DetLocalVisualizer()
    visualizer.dataset_meta = dataset.metainfo
    for data in dataset:
        sample = model.test_step({k: [v] for k, v in data.items()})[0]
        height, width = (ZOOM * side for side in sample.ori_shape)
        truth, found = sample.gt_instances, sample.pred_instances
        for instances in (truth, found):
            instances.bboxes = instances.bboxes * ZOOM
        truth.masks = truth.masks.resize((height, width))
        if 'masks' in found:
            for axis in (1, 2):
                found.masks = found.masks.repeat_interleave(ZOOM, axis)
        image = cv2.imread(sample.img_path)[..., ::-1]
        visualizer.add_datasample(
            'picture',
            cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC),
            sample,
            pred_score_thr=0.5,
            out_file=str(folder / Path(sample.img_path).name),
        )


def make_table(rows: Dict[str, Dict[str, Any]]) -> Table:
    """Put the scores of some evaluations side by side."""
    table = Table('')
    for kind in METRICS:
        for suffix in ('', '50', '75'):
            table.add_column(f'{kind} AP{suffix}', justify='right')
    for name, scores in rows.items():
        cells = [
            scores.get(key + suffix)
            for key in METRICS.values()
            for suffix in ('', '_50', '_75')
        ]
        table.add_row(
            name, *('-' if ap is None else f'{ap:.3f}' for ap in cells)
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('work_dir', type=Path, help='of tools/train.py')
    parser.add_argument('test_dir', type=Path, help='of tools/test.py')
    args = parser.parse_args()

    run = newest(args.work_dir, '*/vis_data/scalars.json')
    scalars = [json.loads(line) for line in run.read_text().splitlines()]
    evaluations = [s for s in scalars if METRICS['box'] in s]
    if not evaluations:
        sys.exit(f'{run} holds no AP: the model finds nothing yet.')
    trained = evaluations[-1]
    tested = json.loads(newest(args.test_dir, '2*/2*.json').read_text())
    plot_curves(scalars, args.work_dir / 'curves.png')
    checkpoint = find_latest_checkpoint(args.work_dir)
    draw_pictures(
        newest(args.work_dir, '*.py'), checkpoint, args.work_dir / 'pictures'
    )
    print(make_table({'train.py': trained, 'test.py': tested}))
    seconds = (
        Path(checkpoint).stat().st_mtime
        - (run.parent / 'config.py').stat().st_mtime
    )
    print(f'Trained in {seconds / 60:.1f} minutes.')
    print(f'Curves: {args.work_dir}/curves.png')
    print(f'Pictures: {args.work_dir}/pictures')
    if any(trained.get(key) != tested.get(key) for key in METRICS.values()):
        sys.exit('The saved checkpoint does not score as the model did.')


if __name__ == '__main__':
    main()
