"""Watch the memory of training and of predictions, image sizes varying.

Trains a small RetinaNet, then predicts with it in three forms, each in a
process of its own, on one thread, and at last in the fast form by eight
threads at once, whose detections are compared with those of one. What leaks
grows on: the growth that is reported is the slope of a straight line through
the last 80 %.
"""

import argparse
import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha1
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Callable, Dict, List, Sequence, Tuple

import cv2
import matplotlib.pyplot as plt
import numpy as np
import torch
from measuring import describe_machine, name_machine, table, use_threads
from mmdet.apis import init_detector
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from fasternet_det.datasets.nuclei import convert
from fasternet_det.deploy import optimize
from fasternet_det.deploy.evaluate import ExportedDetector
from fasternet_det.deploy.export import export, load
from fasternet_det.deploy.metadata import describe

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / 'configs/mini/retinanet_fasternet-t0_fpn_nuclei.py'
Sample = Tuple[float, float]
SIDES = (64, 192)  # of the images, in pixels
THREADS = 8  # that share a model
FORMS: Dict[str, Callable] = {
    'eager': lambda model, folder: model,
    'fast form': lambda model, folder: optimize(model),
    'ONNX Runtime': lambda model, folder: ExportedDetector(
        load(folder / 'model.onnx', threads=1),
        model.cfg.model.data_preprocessor,
        describe(model.cfg),
    ),
}
PAGE = """\
# Memory

Written by `python tools/memory.py`. A RetinaNet with a narrow FasterNet is
trained on the nuclei, two images a batch, then predicts, one image at a time.
Each has another height and another width, of {sides[0]} to {sides[1]} pixels.
Each row is a process of its own, on one thread; in that of the last, {threads}
threads share a model and predict as much each: {same} of these predictions
are, bit for bit, what one thread alone predicts.
All is in MB: what is resident and, by glibc's account, what is in use; it
keeps what is free in small pieces. The growth is of a thousand steps, the
slope of a line through the last 80 %.

{table}

![Memory over the course of training and of predictions](memory.png)

Machine: {machine}
"""


class MallInfo(ctypes.Structure):
    """What glibc's mallinfo2 returns, in bytes."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *('arena', 'ordblks', 'smblks', 'hblks', 'hblkhd', 'usmblks'),
            *('fsmblks', 'uordblks', 'fordblks', 'keepcost'),
        )
    ]


def measure() -> Sample:
    """Memory of this process in MB of 10^6 bytes: resident, and in use."""
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = MallInfo
    info = mallinfo()
    in_use = info.uordblks + info.hblkhd
    return pages * os.sysconf('SC_PAGE_SIZE') / 1e6, in_use / 1e6


def growth(samples: Sequence[float]) -> float:
    """MB per thousand steps, over the last 80 % of them."""
    late = samples[len(samples) // 5 :]
    return 1000 * float(np.polyfit(range(len(late)), late, 1)[0])


class Watch(Hook):
    """Note the memory after every iteration."""

    def __init__(self) -> None:
        self.samples: List[Sample] = []

    def after_train_iter(self, *_: object, **__: object) -> None:
        """Note it."""
        self.samples.append(measure())


def small_config() -> Config:
    """The mini RetinaNet's, narrowed: so many steps are to take minutes."""
    cfg = Config.fromfile(CONFIG)
    arch = dict(embed_dim=16, depths=(1,) * 4, act_cfg=dict(type='GELU'))
    cfg.model.backbone.arch = arch
    cfg.model.neck.update(in_channels=[32, 64, 128], out_channels=32)
    cfg.model.bbox_head.update(
        in_channels=32, feat_channels=32, stacked_convs=1
    )
    return cfg


def train(folder: Path, count: int) -> List[Sample]:
    """Memory after each iteration; leaves weights and an export behind."""
    use_threads(1)
    convert(str(folder / 'nuclei'))
    cfg = small_config()
    cfg.train_pipeline[2].update(
        scale=[SIDES[:1] * 2, SIDES[1:] * 2], keep_ratio=False
    )
    del cfg.train_pipeline[2].ratio_range
    cfg.train_dataloader.batch_size = 2
    cfg.train_dataloader.dataset.update(
        data_root=str(folder / 'nuclei'), pipeline=cfg.train_pipeline
    )
    cfg.train_cfg.max_iters = cfg.param_scheduler[1].end = count
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.default_hooks.checkpoint.interval = count
    cfg.custom_hooks = [dict(type='CheckFiniteHook')]
    cfg.work_dir, watch = str(folder), Watch()
    runner = Runner.from_cfg(cfg)
    runner.register_hook(watch, 'LOWEST')
    runner.train()
    export(runner.model.eval(), folder / 'model.onnx', describe(cfg))
    return watch.samples


def predict(
    model: torch.nn.Module, image: np.ndarray, count: int, threads: int = 1
) -> Tuple[List[Sample], List[bytes]]:
    """Predict the image in ever other sizes, as often by each thread.

    Returns the memory after each prediction, and of each what it found.
    """
    samples = []

    def step(size: Tuple[int, int]) -> bytes:
        resized = cv2.resize(image, size)
        shape = resized.shape[:2]
        sample = DetDataSample(
            metainfo=dict(
                img_shape=shape, ori_shape=shape, scale_factor=(1.0, 1.0)
            )
        )
        pixels = torch.from_numpy(resized).permute(2, 0, 1)  # (3, H, W)
        data = dict(inputs=[pixels], data_samples=[sample])
        with torch.no_grad():
            found = model.test_step(data)[0].pred_instances
        samples.append(measure())
        values = (found.bboxes, found.scores, found.labels)
        return sha1(b''.join(x.numpy().tobytes() for x in values)).digest()

    generator = np.random.default_rng(0)
    sizes = generator.integers(*SIDES, (count, 2), endpoint=True).tolist()

    def run(first: int) -> List[bytes]:
        use_threads(1)  # a setting that each thread has for itself
        found = [step(size) for size in sizes[first:] + sizes[:first]]
        return found[-first:] + found[:-first]

    if threads == 1:
        return samples, run(0)
    # Each begins with another size.
    starts = [thread * count // threads for thread in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        return samples, sum(pool.map(run, starts), [])


def predict_by(
    form: str, folder: Path, *counts: int
) -> Tuple[List[Sample], List[bytes]]:
    """Predict, by a form of what was trained."""
    use_threads(1)
    weights = (folder / 'last_checkpoint').read_text()
    model = init_detector(small_config(), weights, device='cpu')
    image = cv2.imread(str(next(folder.glob('nuclei/val/*.png'))))
    return predict(FORMS[form](model, folder), image, *counts)


def alone(run: Callable, *args: object) -> Any:
    """Run in a process that has done nothing before."""
    with get_context('spawn').Pool(1) as pool:
        return pool.apply(run, args)


def write(series: Dict[str, List[Sample]], same: int, out: Path) -> None:
    """Write a page with a table, and a figure."""
    figure, axes = plt.subplots(figsize=(7, 4), layout='constrained')
    rows = []
    for name, samples in series.items():
        done = np.linspace(0, 100, len(samples))
        resident, in_use = zip(*samples)
        (line,) = axes.plot(done, resident, label=name)
        axes.plot(done, in_use, ':', color=line.get_color())
        row = [name, str(len(samples))]
        for values in (resident, in_use):
            at = values[0], values[len(values) // 5], values[-1]
            row += [f'{value:.0f}' for value in at]
            row.append(f'{round(growth(values), 1) + 0:+.1f}')  # not -0.0
        rows.append(row)
    axes.set(xlabel='% done', ylabel='memory in MB', ylim=(0, None))
    axes.legend(loc='lower right', title='resident; dotted: in use')
    figure.savefig(out / 'memory.png', dpi=100, metadata={'Software': None})
    header = ['resident: first', 'at 20 %', 'last', 'growth']
    header += [name.replace('resident', 'in use') for name in header]
    machine = name_machine(describe_machine())
    page = PAGE.format(
        table=table(['', 'times', *header], rows),
        sides=SIDES,
        threads=THREADS,
        same=same,
        machine=machine,
    )
    (out / 'memory.md').write_text(page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--iterations', type=int, default=5000)
    parser.add_argument('--predictions', type=int, default=5000)
    parser.add_argument(
        '--out',
        type=Path,
        default=ROOT / 'docs',
        help='folder for memory.md and memory.png (default: docs)',
    )
    args = parser.parse_args()
    with TemporaryDirectory() as name:
        folder = Path(name)
        series = {'training': alone(train, folder, args.iterations)}
        found = {}
        for form in FORMS:
            series[form], found[form] = alone(
                predict_by, form, folder, args.predictions
            )
        form = 'fast form'
        name = f'{form}, {THREADS} threads'
        series[name], shared = alone(
            predict_by, form, folder, args.predictions, THREADS
        )
    same = sum(a == b for a, b in zip(shared, THREADS * found[form]))
    write(series, same, args.out)


if __name__ == '__main__':
    main()
