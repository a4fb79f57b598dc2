"""Compare models, forms of them and runtimes, side by side on this machine.

A SIDE is NAME[@RUNTIME][:option,...]. NAME is fasternet-ARCH,
timm-fasternet-ARCH, g-ghost-ARCH, resnet-18, resnet-50, either of these with
-spconv or -saconv, mobilenet-v2, swin-t, pvt-v2-b0, pvt-v2-b1, pvt-v2-b2, or
the config of a detector. RUNTIME is torch, onnxruntime or openvino. Without
options, a side is the plain module in float32; the options are

  original       the original's forward in every FasterNet block
  fold           BatchNorms folded
  channels_last  memory format
  optimize       fasternet_det.deploy.optimize
  direct         the same without Winograd's tiles
  bf16, int8     precision
  compile        torch.compile

Ratios are against the first side. Sides of the same model must agree with the
first of them before anything is timed.
"""

import argparse
import copy
import json
import os
import shlex
import sys
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from benchmark_measure import (
    alternate,
    count_flops,
    count_traffic,
    difference,
    matmul_peak,
    memory_bandwidth,
    peak_memory,
    quartiles,
    top_operators,
)
from benchmark_models import (
    TOLERANCES,
    Side,
    as_original,
    build_model,
    build_side,
    detector_samples,
    fill,
    lacks_timm,
    parse,
    read_config,
)
from benchmark_report import (
    describe_machine,
    page,
    reported,
    to_markdown,
    write,
)
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_overlaps
from mmengine.structures import InstanceData
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor

from fasternet_det.backbones.fasternet import PartialConv
from fasternet_det.deploy import winograd
from fasternet_det.deploy.operators import FusedConv2d, kernel_dtypes

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / 'configs' / 'fasternet'
DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16}
# Paper, Table 1: channels and side of the maps, of stacks of ten layers.
PAPER_MAPS = ((96, 56), (192, 28), (384, 14), (768, 7))
PAPER_LAYERS = 10
# Channels, and batch and sides of maps, of detectors at 800x1216.
CHANNELS = (64, 96, 128, 256, 512)
WINOGRAD_MAPS = (
    *((1, 200, 304), (1, 100, 152), (1, 50, 76), (1, 25, 38), (1, 13, 19)),
    *((1, 7, 10), (100, 14, 14)),
)
NO_BFLOAT16 = 'this CPU does not compute in bfloat16'
AGREEMENT = 0.95  # least share of detections that float32 sides have in common


def ratios(reference: Sequence[float], times: Sequence[float]) -> List[float]:
    """Quartiles of how often faster, round by round."""
    return quartiles([a / b for a, b in zip(reference, times)])


def agreement(found: InstanceData, reference: InstanceData) -> float:
    """Share of the detections that two results have in common: of one label,
    boxes of IoU 0.95, scores within 1%, and 99% of the mask's pixels.

    Raises:
        ValueError: If the reference is empty: that another result is empty
            too proves nothing.
    """
    if not len(reference):
        raise ValueError(
            'finds nothing in an image, so there are no detections to '
            'compare; expected weights, or a score threshold, that give some'
        )
    same = bbox_overlaps(found.bboxes.float(), reference.bboxes.float()) > 0.95
    same &= found.labels[:, None] == reference.labels
    scores = found.scores.float()[:, None], reference.scores.float()
    same &= (scores[0] - scores[1]).abs() <= 0.01 * scores[1].abs()
    if 'masks' in found and 'masks' in reference:
        for i, j in same.nonzero().tolist():
            equal = (found.masks[i] == reference.masks[j]).float().mean()
            same[i, j] = equal >= 0.99
    common = min(int(same.any(0).sum()), int(same.any(1).sum()))
    return common / max(len(found), len(reference))


def compare(sides: Sequence[Side]) -> List[Dict[str, Any]]:
    """Compare each side's outputs with the first side of the same model.

    Raises:
        ValueError: If they differ by more than rounding explains, or the
            first side of a model finds nothing in an image.
    """
    rows: List[Dict[str, Any]] = []
    firsts: Dict[str, Tuple[Sequence[Tensor], List[InstanceData]]] = {}
    for side in sides:
        name, precision = side.spec.side, side.spec.precision
        maps = side.maps()
        found = side.found() if side.model.samples else []
        row: Dict[str, Any] = dict(difference=None, agreement=None)
        row['detections'] = [len(instances) for instances in found]
        rows.append(row)
        if side.model.key not in firsts:
            if maps is None:
                raise ValueError(f'{name} has no maps: name it after others')
            try:
                for instances in found:
                    agreement(instances, instances)
            except ValueError as error:
                raise ValueError(f'{name} {error}') from error
            firsts[side.model.key] = maps, found
            continue
        first_maps, first_found = firsts[side.model.key]
        if maps is not None:
            try:
                row['difference'] = difference(maps, first_maps)
            except ValueError as error:
                raise ValueError(f'{name} {error}') from error
            if row['difference'] > TOLERANCES[precision]:
                raise ValueError(
                    f'{name} does not compute what the first side of its '
                    f'model does: its maps differ by {row["difference"]:.2g} '
                    'of the largest value, more than '
                    f'{TOLERANCES[precision]:g}, which {precision} would '
                    'explain'
                )
        if found:
            row['agreement'] = min(map(agreement, found, first_found))
            if precision == 'float32' and row['agreement'] < AGREEMENT:
                raise ValueError(
                    f'{name} finds {row["detections"]} objects, of which '
                    f'{row["agreement"]:.0%} are those of the first side of '
                    f'its model; expected {AGREEMENT:.0%}'
                )
    return rows


def measure(
    sides: Sequence[str],
    size: Sequence[int],
    batch: int = 1,
    threads: Optional[int] = None,
    rounds: int = 20,
    checkpoint: Optional[str] = None,
    profiled: bool = True,
) -> Dict[str, Any]:
    """Compare and time sides.

    Args:
        sides (Sequence[str]): See the top of this file.
        size (Sequence[int]): Height and width of the images in pixels.
        batch (int): Number of images. Defaults to 1, for latency.
        threads (int, optional): Defaults to torch's own number.
        rounds (int): Timed turns of each side. Defaults to 20.
        checkpoint (str, optional): Of the detectors. Defaults to None, seeded
            weights.
        profiled (bool): Whether to record memory and operators too.

    Returns:
        dict: Settings, peaks and a row for each side.

    Raises:
        ValueError: If a side is unknown, cannot be built, or differs.
    """
    specs = [parse(side) for side in sides]
    lacking = lacks_timm()
    if lacking and any(spec.is_timm for spec in specs):
        specs = [spec for spec in specs if not spec.is_timm]
        if not specs:
            raise ValueError(lacking)
        print('Without the sides of timm:', lacking, file=sys.stderr)
    threads = threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    print('Measuring', *(spec.side for spec in specs), file=sys.stderr)
    models = {
        name: build_model(name, size, batch, checkpoint)
        for name in dict.fromkeys(spec.name for spec in specs)
    }
    with torch.no_grad(), TemporaryDirectory() as folder:
        counts = {
            name: count_flops(model.run_of(model.module))[1]
            for name, model in models.items()
        }
        built = [
            build_side(spec, models[spec.name], threads, Path(folder))
            for spec in specs
        ]
        rows = compare(built)
        peaks = {
            precision: matmul_peak(DTYPES[precision])
            for precision in dict.fromkeys(spec.precision for spec in specs)
            if precision in DTYPES
        }
        bandwidth_way, bandwidth = memory_bandwidth()
        # The peak takes its turns too: clocks drift.
        timed = [side.run for side in built]
        timed += [run for _, run, _ in peaks.values()]
        times = alternate(timed, rounds)
        peak_times = dict(zip(peaks, times[len(built) :]))
        for spec, side, row, series in zip(specs, built, rows, times):
            model = models[spec.name]
            flops = counts[spec.name]
            row.update(
                side=spec.side,
                label=spec.side.replace(spec.name, model.name),
                model=model.name,
                precision=spec.precision,
                params=sum(p.numel() for p in model.module.parameters()),
                flops=flops,
                reported=reported(model.name, model.config),
                seconds=quartiles(series),
                ratio=ratios(times[0], series),
                images_per_second=batch / quartiles(series)[1],
                flop_per_second=2 * flops / quartiles(series)[1],
                peak_share=None,
                traffic=None,
                peak_memory=None,
                operators=None,
            )
            if spec.precision in peaks:
                operations = peaks[spec.precision][2]
                row['peak_share'] = quartiles(
                    [
                        (2 * flops / a) / (operations / b)
                        for a, b in zip(series, peak_times[spec.precision])
                    ]
                )[1]
            if side.module is not None and profiled:
                row['peak_memory'] = peak_memory(side.run)
                row['operators'] = top_operators(side.run)
                if 'compile' not in spec.options:
                    row['traffic'] = count_traffic(side.run)
    return dict(
        kind='models',
        size=list(size),
        batch=batch,
        threads=threads,
        rounds=rounds,
        checkpoint=checkpoint,
        detectors=any(model.samples for model in models.values()),
        peaks={
            precision: dict(
                way=way,
                median=operations / quartiles(peak_times[precision])[1],
                best=operations / min(peak_times[precision]),
            )
            for precision, (way, _, operations) in peaks.items()
        },
        bandwidth=dict(way=bandwidth_way, bytes_per_second=bandwidth),
        rows=rows,
    )


def measure_scaling(
    sides: Sequence[str],
    sizes: Sequence[Sequence[int]],
    batches: Sequence[int],
    **settings: Any,
) -> Dict[str, Any]:
    """Time sides as images grow, at batch 1, and as the batch grows, at the
    first of the sizes.
    """
    points = [(size, 1) for size in sizes]
    points += [(sizes[0], batch) for batch in batches if batch > 1]
    return dict(
        kind='scaling',
        points=[
            measure(sides, size, batch, profiled=False, **settings)
            for size, batch in points
        ],
    )


def stack(layer: nn.Module) -> nn.Module:
    """Ten copies of a layer, seeded."""
    return fill(
        nn.Sequential(*(copy.deepcopy(layer) for _ in range(PAPER_LAYERS)))
    )


def measure_operators(
    batch: int = 1, threads: Optional[int] = None, rounds: int = 20
) -> Dict[str, Any]:
    """Time the operators of the paper's Table 1, in its stacks of ten.

    The group convolution has as many FLOPs as the PConv, C^2 / 16; so have
    the regular one of C / 4 channels and the depthwise one of C^2 / 16, which
    the paper's text has in mind when it widens networks with such layers.
    """
    threads = threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    rows = []
    with torch.no_grad():
        for channels, side in PAPER_MAPS:
            wide = channels**2 // 16
            layers = {
                'PConv, r = 1/4': (channels, PartialConv(channels)),
                'regular': (channels, conv(channels, 1)),
                'regular, C / 4': (channels // 4, conv(channels // 4, 1)),
                'group, 16 groups': (channels, conv(channels, 16)),
                'depthwise': (channels, conv(channels, channels)),
                'depthwise, C^2 / 16': (wide, conv(wide, wide)),
            }
            runs = []
            for width, layer in layers.values():
                x = torch.randn(batch, width, side, side)
                runs.append(partial(stack(layer), x))
            times = alternate(runs, rounds)
            for (name, (width, _)), run, series in zip(
                layers.items(), runs, times
            ):
                flops = count_flops(run)[1]
                seconds = quartiles(series)
                rows.append(
                    dict(
                        operator=name,
                        map=[width, side, side],
                        flops=flops,
                        seconds=seconds,
                        ratio=ratios(times[0], series),
                        flops_per_second=flops / seconds[1],
                    )
                )
    return dict(
        kind='operators',
        batch=batch,
        threads=threads,
        rounds=rounds,
        layers=PAPER_LAYERS,
        rows=rows,
    )


def measure_winograd(
    threads: Optional[int] = None, rounds: int = 20
) -> Dict[str, Any]:
    """Time 3x3 convolutions with ReLU by Winograd's tiles, whether the fast
    form takes these or not, against oneDNN's direct ones.

    Raises:
        ValueError: If they differ by more than rounding explains.
    """
    threads = threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    rows = []
    with torch.no_grad():
        for channels, (batch, *size) in product(CHANNELS, WINOGRAD_MAPS):
            layer = fill(conv(channels, 1))
            direct = FusedConv2d(layer, nn.ReLU(inplace=True))
            direct.winograd = False
            x = torch.randn(batch, channels, *size)
            x = x.to(memory_format=torch.channels_last)
            tiles = partial(
                *(winograd.convolve, x, winograd.transform(layer.weight)),
                *(layer.bias, direct.activation),
            )
            error = difference([tiles()], [direct(x)])
            if error > 1e-5:
                raise ValueError(f'{x.shape}: they differ by {error:.1e}')
            times = alternate([partial(direct, x), tiles], rounds)
            rows.append(
                dict(
                    map=list(x.shape),
                    direct=quartiles(times[0]),
                    winograd=quartiles(times[1]),
                    ratio=ratios(*times),
                    difference=error,
                    used=winograd.wins(x.shape, channels),
                )
            )
    return dict(kind='winograd', threads=threads, rounds=rounds, rows=rows)


def conv(channels: int, groups: int) -> nn.Conv2d:
    """A 3x3 convolution."""
    return nn.Conv2d(
        channels, channels, 3, padding=1, groups=groups, bias=False
    )


class TrainingSide:
    """A detector, its optimizer and one training step."""

    def __init__(
        self,
        detector: nn.Module,
        config: Any,
        inputs: Tensor,
        samples: List[DetDataSample],
    ) -> None:
        optimizer = dict(config.optim_wrapper.optimizer)
        kind = getattr(torch.optim, optimizer.pop('type'))
        self.detector = detector.train()
        self.optimizer = kind(detector.parameters(), **optimizer)
        self.inputs, self.samples = inputs, samples

    def backward(self) -> Tensor:
        """Loss of the batch; its gradients stay in the parameters."""
        losses = self.detector.loss(self.inputs, self.samples)
        loss, _ = self.detector.parse_losses(losses)
        loss.backward()
        return loss.detach()

    def step(self) -> None:
        """Forward, backward and update; leaves no gradients."""
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def held(self) -> int:
        """Bytes of weights, statistics and optimizer state."""
        state = self.detector.state_dict(), self.optimizer.state_dict()
        return sum(
            leaf.nbytes
            for leaf in torch.utils._pytree.tree_leaves(state)
            if isinstance(leaf, Tensor)
        )


def measure_training(
    config: str,
    size: Sequence[int],
    batch: int,
    threads: Optional[int] = None,
    rounds: int = 20,
) -> Dict[str, Any]:
    """Time the training step of a detector, and its peak memory: with the
    original's blocks, with ours, and with ours recomputed (``with_cp``).

    Raises:
        ValueError: If losses or gradients of the sides differ.
    """
    threads = threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    print('Measuring the training step of', config, file=sys.stderr)
    parsed = read_config(config)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(batch, 3, *size, generator=generator)
    samples = detector_samples(size, batch)
    extent = torch.tensor([size[1], size[0]])
    for sample in samples:  # ten boxes of a tenth to a half of the image
        top_left = torch.rand(10, 2, generator=generator) / 2
        sides = 0.1 + 0.4 * torch.rand(10, 2, generator=generator)
        boxes = torch.cat((top_left, top_left + sides), 1)
        sample.gt_instances = InstanceData(
            bboxes=boxes * extent.repeat(2),
            labels=torch.arange(10) % parsed.model.bbox_head.num_classes,
        )
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4))

    def detector(**backbone: Any) -> nn.Module:
        model = copy.deepcopy(parsed.model)
        model.backbone.update(backbone)
        with torch.no_grad():
            return fill(MODELS.build(model))

    detectors = {
        'original': as_original(detector()),
        'ours': detector(),
        'ours, with_cp': detector(with_cp=True),
    }
    built = {
        name: TrainingSide(module, parsed, inputs, samples)
        for name, module in detectors.items()
    }
    rows = []
    reference: List[Tensor] = []
    for name, side in built.items():
        torch.manual_seed(0)  # equal drop paths
        values = [side.backward()]
        values += [p.grad for p in side.detector.parameters()]
        reference = reference or copy.deepcopy(values)
        worst = difference([values[0]], [reference[0]])
        gradients = torch.cat([v.flatten() for v in values[1:]])
        expected = torch.cat([v.flatten() for v in reference[1:]])
        off = difference([gradients], [expected])
        if max(worst, off) > 1e-3:
            raise ValueError(
                f'{name}: loss and gradients differ from those of the '
                f'original by {worst:.2g} and {off:.2g}, expected 0.001'
            )
        side.optimizer.step()
        side.optimizer.zero_grad()
        rows.append(dict(side=name, loss=float(values[0]), difference=off))
    del reference, values, gradients, expected
    times = alternate([side.step for side in built.values()], rounds)
    for row, side, series in zip(rows, built.values(), times):
        beyond = peak_memory(side.step)
        row.update(
            seconds=quartiles(series),
            ratio=ratios(times[0], series),
            held=side.held(),
            peak_memory=beyond + side.held(),
            operators=top_operators(side.step),
        )
        row['memory_ratio'] = row['peak_memory'] / rows[0]['peak_memory']
        row['beyond_ratio'] = beyond / (
            rows[0]['peak_memory'] - rows[0]['held']
        )
    return dict(
        kind='training',
        config=Path(config).stem,
        size=list(size),
        batch=batch,
        threads=threads,
        rounds=rounds,
        rows=rows,
    )


def judge(runs: Dict[str, Dict[str, Any]]) -> List[Dict[str, Any]]:
    """Make the goals table of what :func:`measure_goals` ran.

    Returns:
        list[dict]: ``goal``, ``target``, ``value``, ``reached``, and the
        slowest ``operators`` of the side it is about.
    """
    rows: List[Dict[str, Any]] = []

    def add(
        name: str, target: str, value: str, reached: bool, row: Dict[str, Any]
    ) -> None:
        rows.append(
            dict(
                goal=name,
                target=target,
                value=value,
                reached=reached,
                operators=row['operators'],
            )
        )

    def without(name: str, target: str, why: str) -> None:
        add(name, target, why, False, dict(operators=[]))

    def faster(name: str, row: Optional[Dict[str, Any]], least: float) -> None:
        if row is None:
            return without(name, f'>= {least}x', NO_BFLOAT16)
        low, median, high = row['ratio']
        value = f'{median:.2f}x ({low:.2f} to {high:.2f})'
        add(name, f'>= {least}x', value, median >= least, row)

    def shape(run: str) -> str:
        return '{}x{}'.format(*runs[run]['size'])

    _, float32, *others = runs['backbone-s']['rows']
    bfloat16 = others[0] if others else None
    name = f'backbone S, {shape("backbone-s")}'
    faster(f'{name}, float32', float32, 1.5)
    share = float32['peak_share']
    add(
        f'{name}, float32: share of the matmul peak',
        '>= 80%',
        f'{share:.0%}',
        share >= 0.8,
        float32,
    )
    faster(f'{name}, bf16', bfloat16, 7)
    against = f'{name}, bf16: against OpenVINO bf16', '> 1x'
    if len(others) == 2:
        edge = others[1]['seconds'][1] / others[0]['seconds'][1]
        add(*against, f'{edge:.2f}x', edge > 1, others[0])
    else:
        why = 'openvino is not installed' if others else NO_BFLOAT16
        without(*against, why)
    faster(
        f'backbone T0, {shape("backbone-t0")}, float32, 1 thread',
        runs['backbone-t0']['rows'][1],
        1.3,
    )
    for arch in ('s', 't0'):
        run = f'mask-rcnn-{arch}'
        faster(
            f'Mask R-CNN {arch.upper()}, whole, {shape(run)}, bf16',
            runs[run]['rows'][2] if others else None,
            4,
        )
    name = f'training step of RetinaNet S, 2 images {shape("training")}'
    _, ours, recomputed = runs['training']['rows']
    faster(f'{name}: time', ours, 1)
    for row, most in ((ours, 0.85), (recomputed, 0.6)):
        ratio = row['memory_ratio']
        add(
            f'{name}: peak memory, {row["side"]}',
            f'<= {most}x',
            f'{ratio:.2f}x ({row["beyond_ratio"]:.2f}x beyond weights and '
            'optimizer state)',
            ratio <= most,
            row,
        )
    return rows


def measure_goals(
    threads: Optional[int] = None, rounds: int = 20, shrink: int = 1
) -> Dict[str, Any]:
    """Measure every goal, each against the original in the same run.

    Args:
        threads (int, optional): Defaults to torch's own number.
        rounds (int): Timed turns of each side. Defaults to 20.
        shrink (int): Divides the sides of all images, to try this out.
            Defaults to 1.
    """
    threads = threads or torch.get_num_threads()
    large, tiny, square = (
        [max(64, side // shrink) for side in size]
        for size in ((800, 1216), (224, 224), (512, 512))
    )
    forms, openvino = [':original', ':optimize'], []
    if torch.bfloat16 in kernel_dtypes():
        forms.append(':optimize,bf16')
        if find_spec('openvino'):
            openvino = ['fasternet-s@openvino:bf16']
    runs = {}
    runs['backbone-s'] = measure(
        [f'fasternet-s{form}' for form in forms] + openvino,
        large,
        threads=threads,
        rounds=rounds,
    )
    runs['backbone-t0'] = measure(
        [f'fasternet-t0{form}' for form in forms[:2]],
        tiny,
        threads=1,
        rounds=rounds,
    )
    for arch in ('s', 't0'):
        config = CONFIGS / f'mask-rcnn_fasternet-{arch}_fpn_1x_coco.py'
        runs[f'mask-rcnn-{arch}'] = measure(
            [f'{config}{form}' for form in forms],
            large,
            threads=threads,
            rounds=rounds,
        )
    config = CONFIGS / 'retinanet_fasternet-s_fpn_1x_coco.py'
    runs['training'] = measure_training(
        str(config), square, 2, threads, rounds
    )
    return dict(kind='goals', rows=judge(runs), runs=runs)


def add_sides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('sides', nargs='+', metavar='SIDE')
    parser.add_argument(
        '--checkpoint', help='weights of the detectors; seeded by default'
    )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest='command', required=True)
    measuring = argparse.ArgumentParser(add_help=False)
    measuring.add_argument('--out', type=Path, required=True, metavar='DIR')
    measuring.add_argument('--name', help="of the files; the command's")
    measuring.add_argument('--threads', type=int, help="torch's by default")
    measuring.add_argument('--rounds', type=int, default=20)

    models = commands.add_parser(
        'models', parents=[measuring], help='compare sides'
    )
    add_sides(models)
    models.add_argument(
        '--size', type=int, nargs=2, default=(800, 1216), metavar=('H', 'W')
    )
    models.add_argument('--batch', type=int, default=1)

    scaling = commands.add_parser(
        'scaling', parents=[measuring], help='time against pixels and batch'
    )
    add_sides(scaling)
    scaling.add_argument(
        '--sizes',
        nargs='+',
        default=['224x224', '320x480', '480x736', '640x960', '800x1216'],
        metavar='HxW',
    )
    scaling.add_argument(
        '--batches', type=int, nargs='+', default=[1, 2, 4, 8, 16]
    )

    operators = commands.add_parser(
        'operators', parents=[measuring], help="the paper's Table 1"
    )
    operators.add_argument('--batch', type=int, default=1)

    commands.add_parser(
        'winograd', parents=[measuring], help='3x3 convolutions, both ways'
    )

    training = commands.add_parser(
        'training', parents=[measuring], help='training step of a detector'
    )
    training.add_argument('config', metavar='CONFIG')
    training.add_argument(
        '--size', type=int, nargs=2, default=(512, 512), metavar=('H', 'W')
    )
    training.add_argument('--batch', type=int, default=2)

    goals = commands.add_parser(
        'goals', parents=[measuring], help="this project's goals"
    )
    goals.add_argument(
        '--shrink', type=int, default=1, help='divide the sides of all images'
    )

    report = commands.add_parser(
        'report', help='make one page of what has been measured'
    )
    report.add_argument('folders', type=Path, nargs='+', metavar='DIR')
    report.add_argument('--out', type=Path, required=True, metavar='FILE.md')
    return parser


def parse_size(text: str) -> List[int]:
    """Parse HxW."""
    try:
        height, width = map(int, text.split('x'))
    except ValueError:
        raise ValueError(f'{text!r} is not a size such as 800x1216') from None
    return [height, width]


def run(args: argparse.Namespace) -> Dict[str, Any]:
    """Measure what the command line asks for."""
    settings: Dict[str, Any] = dict(threads=args.threads, rounds=args.rounds)
    if args.command == 'models':
        return measure(
            args.sides,
            args.size,
            args.batch,
            checkpoint=args.checkpoint,
            **settings,
        )
    if args.command == 'scaling':
        sizes = [parse_size(size) for size in args.sizes]
        return measure_scaling(
            args.sides,
            sizes,
            args.batches,
            checkpoint=args.checkpoint,
            **settings,
        )
    if args.command == 'operators':
        return measure_operators(args.batch, **settings)
    if args.command == 'winograd':
        return measure_winograd(**settings)
    if args.command == 'training':
        return measure_training(args.config, args.size, args.batch, **settings)
    return measure_goals(shrink=args.shrink, **settings)


def report(folders: Sequence[Path], out: Path) -> None:
    """Make one page of the results in some folders."""
    files = [file for folder in folders for file in folder.glob('*.json')]
    if not files:
        raise ValueError(
            f'there is no result in {", ".join(map(str, folders))}'
        )
    page(
        {
            file.stem: json.loads(file.read_text())
            for file in sorted(files, key=lambda file: file.stem)
        },
        out,
    )


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    os.environ['KINETO_LOG_LEVEL'] = '99'  # torch's profiler says when it runs
    try:
        if args.command == 'report':
            report(args.folders, args.out)
            print(args.out)
            return
        result = run(args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    result['machine'] = describe_machine()
    # paths of this machine by their last part
    paths = {str(args.out), str(getattr(args, 'checkpoint', None))}
    words = [Path(w).name if w in paths else w for w in sys.argv]
    # what is set of glibc's malloc, as it matters
    malloc = [f'{k}={v}' for k, v in os.environ.items() if k[:7] == 'MALLOC_']
    result['command'] = shlex.join(
        [*sorted(malloc), 'python', 'tools/benchmark.py', *words[1:]]
    )
    for file in write(result, args.out, args.name or args.command):
        print(file)
    Console(width=200).print(Markdown(to_markdown(result)))


if __name__ == '__main__':
    main()
