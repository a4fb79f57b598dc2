"""Put FasterNet into every detector of mmdet, and say what works.

Of each family, a folder of mmdet's configs, the ResNet-50 of one config (the
nearest, where there is none) gives way to FasterNet-T0. Then it is built,
trained for a step, asked for detections, brought into its fast form and
exported. Each family runs in a process of its own, so that what crashes or
hangs costs one row; what --out holds already is not run again.
"""

import argparse
import copy
import json
import os
import re
import shlex
import sys
import textwrap
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import (
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    Optional,
    Sequence,
    Tuple,
)

import torch
import torch.nn as nn
from benchmark import agreement, ratios
from benchmark_measure import alternate, difference
from benchmark_models import (
    Model,
    detector_samples,
    exported_side,
    fill,
    parse,
)
from benchmark_report import describe_machine, table
from mmdet.models import BaseDetector
from mmdet.registry import MODELS
from mmdet.structures.mask import BitmapMasks, mask2bbox
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData, PixelData
from mmengine.utils import get_installed_path

from fasternet_det.deploy import optimize

PAGE = Path(__file__).resolve().parents[1] / 'docs' / 'compatibility.md'
CONFIGS = Path(get_installed_path('mmdet'), '.mim', 'configs')
# Which config of a family is taken: of the first of these that any of them
# matches, the one of the shortest name.
PREFERRED = (r'[_-]r50', r'[_-]r18', r'[_-](tiny|t|s|b0)[_-]', '')
# Where that would not be what the family is about.
CHOSEN = {
    'cascade_rpn': 'cascade-rpn_faster-rcnn_r50-caffe_fpn_1x_coco',
    'lad': 'lad_r50-paa-r101_fpn_2xb8_coco_1x',
    'libra_rcnn': 'libra-faster-rcnn_r50_fpn_1x_coco',
    'nas_fpn': 'retinanet_r50_nasfpn_crop640-50e_coco',
    # others miss their base
    'sort': 'faster-rcnn_r50_fpn_8xb2-4e_mot17halftrain_test-mot17halfval',
}
POSITIONS = {4: 0, 8: 2, 16: 4, 32: 6}  # of the maps of these strides
# What no rule knows: what else FasterNet wants changed in a family's config,
CHANGES: Dict[str, Dict[str, Any]] = {
    # an Hourglass gives its map twice
    'centripetalnet': {'model.bbox_head.num_feat_levels': 1},
    'cornernet': {'model.bbox_head.num_feat_levels': 1},
    # this neck hands on what it takes in
    'ssd': {'model.neck.out_channels': [80, 160, 512, 256, 256, 256]},
}
# and what the trial does.
NO_SYNC = {  # MMSyncBN wants more than one process
    f'model.{part}.norm_cfg.type': 'BN'
    for part in ('neck', 'roi_head.bbox_head', 'roi_head.mask_head')
}
TRIAL_CHANGES: Dict[str, Dict[str, Any]] = {
    # seeded corners of a box seldom have the same class and embedding
    'cornernet': {
        'model.test_cfg.corner_topk': 1000,
        'model.test_cfg.distance_threshold': 1000,
    },
    # these would download the weights of their teachers
    'lad': {'model.teacher_ckpt': None},
    'ld': {'model.teacher_ckpt': None},
    # as it is, it gives a panoptic map and no instances
    'maskformer': {'model.test_cfg.instance_on': True},
    'simple_copy_paste': NO_SYNC,
    'strong_baselines': NO_SYNC,
}
STAGES = ('build', 'train', 'predict', 'float32', 'bfloat16', 'export')
NEEDED = ('build', 'predict')  # by the stages after them
SIZE, LARGE = (160, 192), (320, 384)  # of the images
# In smaller ones, the last maps are less than the kernels of DDOD and SSD, and
# there are fewer places than DINO has queries.
WANT_LARGE = ('ddod', 'dino', 'ssd', 'v3det')
PROPOSALS = 100  # of two-stage detectors, in such small images
ROUNDS = 5  # of the timing
ENOUGH = 20  # detections in an image
# Largest error of the maps, and least share of detections in common.
LIMITS = {torch.float32: (1e-5, 0.95), torch.bfloat16: (0.03, 0)}
CRASHED = 'crashed'  # of a stage, until it ends
HEADER = (
    *('family', 'config', 'outputs', 'changed too', 'trains'),
    *('without gradient', 'finds', 'fast form, float32'),
    *('fast form, bfloat16', 'export', 'why not'),
)
LEGEND = """\
- outputs: `out_indices` of FasterNet. Changed too: what else of the model's
  config, mostly widths that it takes from the backbone.
- trains: one step of two images with boxes, masks and a semantic map. Without
  gradient: parameters that the loss does not reach, with the first of them;
  DistributedDataParallel wants `find_unused_parameters=True` for such.
- finds: objects in an image, by seeded weights and a threshold at which there
  are some 20.
- fast form: `optimize(model, dtype)`; the largest difference of the maps that
  go into the heads, relative to their largest value; share of the detections
  that are the model's: of one label, IoU above 0.95, scores within 1 %, 99 %
  of the mask's pixels; how many times faster, the median of rounds in turns.
- export: to ONNX; the same share in ONNX Runtime, boxes only.
- `-`: not tried, as a stage before it failed or the CPU has no bfloat16."""


class NoDetectorError(ValueError):
    """A folder of configs holds other models."""


def choose(family: str) -> Path:
    """Choose the config of a family."""

    def rank(path: Path) -> tuple:
        name = path.stem
        nearest = [bool(re.search(p, name)) for p in PREFERRED].index(True)
        chosen = name == CHOSEN.get(family)
        return not chosen, nearest, '1x' not in name, len(name), name

    return min(CONFIGS.joinpath(family).glob('*.py'), key=rank)


def read(family: str) -> Config:
    """Read the config of a family, with the detector as its ``model``.

    Raises:
        NoDetectorError: If there is none.
        ValueError: If its backbone is not one of mmdet's.
    """
    init_default_scope('mmdet')
    # What it imports are backbones, which are to go.
    config = Config.fromfile(choose(family), import_custom_modules=False)
    if 'model' not in config:
        raise NoDetectorError('its config has no model')
    kind = MODELS.get(config.model.type)
    if not issubclass(kind, BaseDetector):
        raise NoDetectorError(f'{kind.__name__} is none')
    # A semi-supervised one holds the detector that it trains.
    inner = config.model.get('detector', {})
    if 'type' in inner:
        config.model = inner
    if 'backbone' not in config.model:
        raise ValueError(f'the backbone of {kind.__name__} is not of mmdet')
    return config


def widths(model: Dict[str, Any]) -> Dict[int, int]:
    """Channels of the maps that a model's backbone gives, by stride."""
    try:
        backbone = MODELS.build(model.backbone)
    except KeyError:  # of another package: the last strides, as is usual
        channels = model.neck.in_channels
        return dict(zip(list(POSITIONS)[-len(channels) :], channels))
    backbone.eval()  # returns nothing in mmdet
    x = torch.zeros(1, 3, 256, 256)
    with torch.no_grad():
        return {x.shape[-1] // y.shape[-1]: y.shape[1] for y in backbone(x)}


def swap(value: Any, old: List[int], new: List[int]) -> Any:
    """Swap the widths that a layer, or one layer per map, takes in."""
    if [value] == old:
        return new[0]
    if isinstance(value, (list, tuple)):
        # YOLOv3 starts from the last; SSD's head takes more maps.
        for a, b in ((old, new), (old[::-1], new[::-1])):
            if list(value[: len(a)]) == a:
                return [*b, *value[len(a) :]]
    return value


def rewire(
    part: Any, old: List[int], new: List[int], path: str
) -> Iterator[str]:
    """Swap the backbone's widths wherever a part of a config takes them in.

    Yields:
        str: The names of what changed.
    """
    keys = part.keys() if isinstance(part, dict) else range(len(part))
    for key in keys:
        value, name = part[key], f'{path}.{key}'
        if key == 'in_channels':
            part[key] = swap(value, old, new)
            if part[key] != value:
                yield name
        elif isinstance(value, (dict, list)):
            if not re.search('backbone|teacher|_cfg$', name):
                yield from rewire(value, old, new, name)


def adapt(family: str) -> Tuple[Config, List[str]]:
    """Put FasterNet-T0 into a family's config.

    Returns:
        tuple[Config, list[str]]: The config, and the names of what changed
        beside ``model.backbone``.

    Raises:
        ValueError: See :func:`read`.
    """
    config = read(family)
    old = widths(config.model)
    strides = sorted(old.keys() & POSITIONS.keys())
    config.model.pop('init_cfg', None)  # of a detector with that backbone
    config.model.backbone = dict(
        type='FasterNet',
        arch='t0',
        out_indices=[POSITIONS[stride] for stride in strides],
    )
    new = MODELS.build(config.model.backbone).out_channels
    theirs = [old[stride] for stride in strides]
    changed = list(rewire(config.model, theirs, new, 'model'))
    more = CHANGES.get(family, {})
    config.merge_from_dict(more)
    return config, [*changed, *more]


def make_batch(
    config: Config, detector: nn.Module, size: Sequence[int]
) -> Dict[str, Any]:
    """Two images with what the data loader of a config gives, and proposals
    where the detector makes none.
    """
    height, width = size
    text = str(config)
    boxes = torch.tensor([[8.0, 8, 72, 88], [60, 30, 150, 150]])
    masks = torch.zeros(2, *size, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()):
        mask[y1:y2, x1:x2] = 1
    samples = detector_samples(size, 2)
    for sample in samples:
        sample.set_metainfo(dict(border=(0, height, 0, width)))
        sample.gt_instances = InstanceData(
            bboxes=boxes,
            labels=torch.zeros(2, dtype=torch.long),
        )
        panoptic = 'LoadPanopticAnnotations' in text
        if panoptic or "'with_mask': True" in text:
            sample.gt_instances.masks = BitmapMasks(masks.numpy(), *size)
        if panoptic or "'with_seg': True" in text:
            sample.gt_sem_seg = PixelData(sem_seg=masks[:1] * 0)
        if not getattr(detector, 'with_rpn', True):
            sample.proposals = InstanceData(
                bboxes=boxes + 4, scores=torch.tensor([0.9, 0.8])
            )
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2, 3, *size), generator=generator)
    return dict(inputs=list(images.byte()), data_samples=samples)


def seed(detector: nn.Module) -> nn.Module:
    """Seed weights and statistics, but not what gives boxes their size."""
    initial = copy.deepcopy(detector.state_dict())
    seeded = copy.deepcopy(fill(detector).state_dict())
    kept = {name for name, _ in detector.named_buffers()}
    for name, module in detector.named_modules():
        if isinstance(module, nn.Embedding):  # QueryInst's hold boxes
            kept.add(f'{name}.weight')
    for name, tensor in detector.state_dict().items():
        if name in kept and 'running_' not in name:
            tensor.copy_(initial[name])
        elif re.search(r'reg.*\.bias$', name):  # 4 strides in AutoAssign
            tensor.copy_(initial[name] + seeded[name])
    detector.eval()  # returns nothing in some
    return detector


def with_area(instances: InstanceData) -> InstanceData:
    """Leave out boxes that are lines, whose IoU is that of rounding."""
    boxes = instances.bboxes
    return instances[(boxes[:, 2:] - boxes[:, :2] > 0.1).all(1)]


def found_by(run: Callable[[], Any]) -> InstanceData:
    """What is found in the first image."""
    (sample, *_) = run()
    if 'pred_instances' in sample:
        instances = copy.copy(sample.pred_instances)
    else:  # a panoptic map
        segments = sample.pred_panoptic_seg.sem_seg
        labels = segments.unique()
        instances = InstanceData(
            bboxes=torch.zeros(len(labels), 4),
            scores=torch.ones(len(labels)),
            labels=labels,
            masks=segments == labels[:, None, None],
        )
    if 'masks' in instances and not instances.bboxes.any():
        instances.bboxes = mask2bbox(instances.masks)
    return with_area(instances)


def set_threshold(model: Model) -> InstanceData:
    """Set the highest score threshold at which enough is found: seeded
    weights score as they like.

    Returns:
        InstanceData: What is then found.

    Raises:
        ValueError: If nothing is found, whatever the threshold.
    """
    run = model.run_of(model.module)
    configs = [
        head.test_cfg
        for head in model.module.modules()
        if 'score_thr' in (getattr(head, 'test_cfg', None) or ())
    ]
    for config in configs:  # of YOLOv3 and SOLO
        config.update(dict.fromkeys({*config} & {'conf_thr', 'filter_thr'}, 0))
    low, high = 0.0, 1.0
    for _ in range(10 if configs else 0):
        middle = (low + high) / 2
        for config in configs:
            config.score_thr = middle
        enough = len(found_by(run)) >= ENOUGH
        low, high = (middle, high) if enough else (low, middle)
    for config in configs:
        config.score_thr = low
    found = found_by(run)
    if not len(found):
        raise ValueError('it finds nothing, whatever the threshold')
    return found


class Trial:
    """The detector of a family, from stage to stage.

    Each stage returns what the table says of it, or raises.
    """

    def __init__(self, family: str) -> None:
        self.family = family
        self.size = LARGE if family in WANT_LARGE else SIZE

    def build(self) -> Dict[str, Any]:
        """Build the detector."""
        self.config, changed = adapt(self.family)
        self.config.merge_from_dict(TRIAL_CHANGES.get(self.family, {}))
        model = self.config.model
        for key, rpn in (('train_cfg', 'rpn_proposal'), ('test_cfg', 'rpn')):
            if rpn in (model.get(key) or ()):
                model[key][rpn].max_per_img = PROPOSALS
        self.detector = MODELS.build(model)
        self.detector.init_weights()
        return dict(outputs=model.backbone.out_indices, changed=changed)

    def _batch(self) -> Dict[str, Any]:
        """The images as the model takes them, normalised and padded."""
        detector = self.detector
        batch = make_batch(self.config, detector, self.size)
        return detector.data_preprocessor(batch, detector.training)

    def train(self) -> Dict[str, Any]:
        """Make one training step, from the initial weights."""
        # what a runner would tell some heads
        hub = MessageHub.get_current_instance()
        hub.update_info_dict(dict(epoch=0, iter=0))
        detector = self.detector
        detector.train()
        batch = self._batch()
        loss, _ = detector.parse_losses(detector(**batch, mode='loss'))
        if not loss.isfinite():
            raise ValueError(f'the loss is {loss.item()}')
        loss.backward()
        parameters = list(detector.named_parameters())
        without = [
            name
            for name, parameter in parameters
            if parameter.requires_grad and parameter.grad is None
        ]
        frozen = sum(not p.requires_grad for _, p in parameters)
        return dict(without=without, frozen=frozen)

    @torch.no_grad()
    def predict(self) -> Dict[str, Any]:
        """Find something in an image, with seeded weights."""
        detector = seed(self.detector)
        batch = self._batch()
        image, samples = batch['inputs'][:1], batch['data_samples'][:1]
        self.model = Model(self.family, self.family, detector, image, samples)
        self.found = set_threshold(self.model)
        return dict(detections=len(self.found))

    def float32(self) -> Dict[str, Any]:
        """Compare the fast form in float32."""
        return self._compare(torch.float32)

    def bfloat16(self) -> Optional[Dict[str, Any]]:
        """Compare the one in bfloat16; None where the CPU has no such."""
        if not any('bf16' in i for i in describe_machine()['instructions']):
            return None
        return self._compare(torch.bfloat16)

    @torch.no_grad()
    def _compare(self, dtype: torch.dtype) -> Dict[str, Any]:
        model = self.model
        fast = optimize(model.module, dtype)
        error = difference(model.maps_of(fast), model.maps_of(model.module))
        common = agreement(found_by(model.run_of(fast)), self.found)
        most, least = LIMITS[dtype]
        if error > most or common < least:
            raise ValueError(
                f'its maps differ by {error:.0e}, {common:.0%} of the '
                'detections are the same'
            )
        runs = [model.run_of(form) for form in (model.module, fast)]
        faster = ratios(*alternate(runs, ROUNDS))[1]
        return dict(error=error, common=common, faster=faster)

    def export(self) -> Dict[str, Any]:
        """Export to ONNX, and find the same in ONNX Runtime."""
        spec = parse(f'{self.family}@onnxruntime')
        with TemporaryDirectory() as folder:
            threads = torch.get_num_threads()
            side = exported_side(spec, self.model, threads, Path(folder))
            (found,) = side.found()
        common = agreement(with_area(found), self.found)
        if common < LIMITS[torch.float32][1]:
            raise ValueError(f'{common:.0%} of the detections are the same')
        return dict(common=common)


def reason(error: Exception) -> str:
    """What was raised, in one line."""
    if isinstance(error, NoDetectorError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f'lacks the package {error.name}'
    line = str(error).strip().partition('\n')[0]
    if not line:  # a bare assertion
        line = traceback.extract_tb(error.__traceback__)[-1].line
    # what the registry puts before it, and where packages lie here
    line = re.sub(r'class `\w+` in [\w/]+\.py: |\S*site-packages/', '', line)
    return textwrap.shorten(f'{type(error).__name__}: {line}', 150)


def new_row(family: str) -> Dict[str, Any]:
    """The row of a family of which nothing is known yet."""
    return dict(
        family=family,
        config=choose(family).stem,
        machine=describe_machine(),
        detector=True,
        why={STAGES[0]: CRASHED},
    )


def examine(row: Dict[str, Any], path: Path) -> Dict[str, Any]:
    """Take a family through the stages.

    Args:
        row (dict): To be filled.
        path (Path): Where it is kept, also of a process that dies.

    Returns:
        dict: The row.
    """
    trial = Trial(row['family'])
    log = path.with_suffix('.log').open('w')
    with log, redirect_stdout(log), redirect_stderr(log):
        for stage in STAGES:
            row['why'][stage] = CRASHED
            path.write_text(json.dumps(row, indent=1))
            try:
                row[stage] = getattr(trial, stage)()
                del row['why'][stage]
            except Exception as error:  # noqa: BLE001, each is a result
                traceback.print_exc()
                row['why'][stage] = reason(error)
                row['detector'] = not isinstance(error, NoDetectorError)
                if stage in NEEDED:
                    break
    path.write_text(json.dumps(row, indent=1))
    return row


def examine_apart(family: str, folder: Path, limit: float) -> None:
    """Examine a family in a process of its own, unless that was done."""
    path = folder / f'{family}.json'
    if path.exists() and CRASHED not in path.read_text():
        return
    print(family, flush=True)
    path.write_text(json.dumps(new_row(family)))
    process = get_context('spawn').Process(
        target=examine, args=(new_row(family), path)
    )
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
        fate = f'not done in {limit} s'
    else:
        fate = f'exit code {process.exitcode}'
    path.write_text(path.read_text().replace(CRASHED, fate))


def cells(row: Dict[str, Any]) -> List[str]:
    """A line of the table."""

    def cell(stage: str, form: Callable[..., str]) -> str:
        if stage in row['why']:
            return 'no'
        return form(**row[stage]) if row.get(stage) else '-'

    def names(values: Sequence[str]) -> str:
        return ', '.join(f'`{value}`' for value in values) or '-'

    def gradients(without: List[str], frozen: int) -> str:
        first = f' ({names(without[:1])})' * bool(without)
        return f'{len(without)}{first}' + f', {frozen} frozen' * bool(frozen)

    fast = '{error:.0e}, {common:.0%}, {faster:.2f}x'.format
    why = '; '.join(f'{stage}: {line}' for stage, line in row['why'].items())
    return [
        row['family'],
        row['config'],
        cell('build', lambda outputs, changed: ' '.join(map(str, outputs))),
        cell('build', lambda outputs, changed: names(changed)),
        cell('train', lambda without, frozen: 'yes'),
        cell('train', gradients),
        cell('predict', '{detections}'.format),
        cell('float32', fast),
        cell('bfloat16', fast),
        cell('export', '{common:.0%}'.format),
        why.replace('|', '\\|') or '-',
    ]


def page(rows: Sequence[Dict[str, Any]], command: str) -> str:
    """The page of a sweep.

    Raises:
        ValueError: If the rows are of different machines.
    """
    machine = rows[0]['machine']
    if any(row['machine'] != machine for row in rows):
        raise ValueError(
            '--out holds rows of other machines or versions: name an empty '
            'folder'
        )
    versions = [f'{k} {v}' for k, v in machine['versions'].items() if v]
    others = [
        f'{row["family"]} ({row["why"]["build"]})'
        for row in rows
        if not row['detector']
    ]
    rows = [row for row in rows if row['detector']]
    done = {
        stage: sum(bool(row.get(stage)) for row in rows) for stage in STAGES
    }
    parts = [
        '# Compatibility',
        "Which of mmdet's detectors take FasterNet, and what must be changed: "
        'FasterNet-T0 in the place of the backbone of one config of each '
        f'family, {SIZE[0]}x{SIZE[1]} pixels. Made by',
        f'```bash\n{command}\n```',
        f'**Of {len(rows)} families, {done["build"]} build, {done["train"]} '
        f'train, {done["predict"]} predict; {done["float32"]} have a fast '
        f'form in float32, {done["bfloat16"]} in bfloat16, {done["export"]} '
        'are exported.**',
        LEGEND,
        f'{machine["cpu"]}, {machine["cores"]} cores, '
        f'{", ".join(machine["instructions"])}; Python {machine["python"]}, '
        f'{", ".join(versions)}.',
        table(HEADER, [cells(row) for row in rows]),
    ]
    if others:
        parts.append(f'Folders without a detector: {", ".join(others)}.')
    return '\n\n'.join(parts) + '\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument(
        '--out', type=Path, required=True, help='folder for the results'
    )
    parser.add_argument(
        '--only', nargs='+', metavar='FAMILY', help='and write no page'
    )
    parser.add_argument(
        '--jobs', type=int, default=1, help='families at a time'
    )
    parser.add_argument(
        '--limit', type=int, default=300, help='seconds for a family'
    )
    args = parser.parse_args()
    families = sorted(
        path.name for path in CONFIGS.iterdir() if any(path.glob('*.py'))
    )
    for family in args.only or ():
        if family not in families:
            parser.error(f'{family!r} is none of {", ".join(families)}')
    families = args.only or families
    args.out.mkdir(parents=True, exist_ok=True)
    folder = args.out.resolve()
    threads = max(torch.get_num_threads() // args.jobs, 1)
    os.environ['OMP_NUM_THREADS'] = str(threads)
    os.chdir(CONFIGS.parent)  # from where configs name each other
    with ThreadPoolExecutor(args.jobs) as pool:
        one = partial(examine_apart, folder=folder, limit=args.limit)
        list(pool.map(one, families))
    rows = [
        json.loads((folder / f'{family}.json').read_text())
        for family in families
    ]
    words = [Path(w).name if w == str(args.out) else w for w in sys.argv[1:]]
    command = shlex.join(['python', 'tools/compatibility.py', *words])
    text = page(rows, command)
    if args.only:
        print(text)
    else:
        PAGE.write_text(text)
        print(PAGE)


if __name__ == '__main__':
    main()
