"""Detectors of mmdet with FasterNet in the place of their backbone.

``adapt`` puts it there, as a user would. The rest tries the detectors out
without data and trained weights.
"""

import copy
import re
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple

import torch
import torch.nn as nn
from mmdet.models import BaseDetector
from mmdet.registry import MODELS
from mmdet.structures.mask import BitmapMasks, mask2bbox
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData, PixelData
from mmengine.utils import get_installed_path
from seeded import Model, detector_samples, fill

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
ENOUGH = 20  # detections in an image
SATURATED, TEMPERINGS = 0.99, 6


class NoDetectorError(ValueError):
    """A folder of configs holds other models."""


def choose(family: str) -> Path:
    """Choose the config of a family."""

    def rank(path: Path) -> tuple:
        name = path.stem
        nearest = [bool(re.search(p, name)) for p in PREFERRED].index(True)
        return nearest, '1x' not in name, len(name), name

    folder = CONFIGS / family
    if family in CHOSEN:
        return folder / f'{CHOSEN[family]}.py'
    return min(folder.glob('*.py'), key=rank)


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
    boxes = torch.tensor([[0.1, 0.1, 0.4, 0.5], [0.3, 0.2, 0.8, 0.9]])
    boxes *= boxes.new_tensor([width, height, width, height])
    masks = torch.zeros(2, *size, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()):
        mask[y1:y2, x1:x2] = 1
    samples = detector_samples(size, 2)
    for sample in samples:
        sample.set_metainfo(dict(border=(0, height, 0, width)))
        sample.gt_instances = InstanceData(
            bboxes=boxes, labels=torch.zeros(2, dtype=torch.long)
        )
        panoptic = 'LoadPanopticAnnotations' in text
        if panoptic or "'with_mask': True" in text:
            sample.gt_instances.masks = BitmapMasks(masks.numpy(), *size)
        if panoptic or "'with_seg': True" in text:
            sample.gt_sem_seg = PixelData(sem_seg=masks[:1] * 0)
        if not getattr(detector, 'with_rpn', True):
            sample.proposals = InstanceData(
                bboxes=boxes * 0.95, scores=torch.tensor([0.9, 0.8])
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
        elif re.search(r'reg.*\.bias$', name):  # such as 4 in AutoAssign
            # CenterNet clamps distances below 0.
            tensor.copy_(initial[name] + seeded[name].abs())
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


def find_threshold(model: Model) -> InstanceData:
    """Set the highest score threshold at which enough is found: seeded
    weights score as they like.

    Returns:
        InstanceData: What is then found.
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
    return found_by(run)


def set_threshold(model: Model) -> InstanceData:
    """Set the score threshold of a detector, and temper its scores: where the
    best are all 1 to the last digit, rounding says which NMS keeps.

    Returns:
        InstanceData: What is then found.

    Raises:
        ValueError: If nothing is found, whatever the threshold.
    """
    found = find_threshold(model)
    for _ in range(TEMPERINGS):
        if not (found.scores > SATURATED).any():
            break
        for name, parameter in model.module.named_parameters():
            if parameter.dim() > 1 and re.search('cls|obj', name):
                parameter.data /= 2
        found = find_threshold(model)
    if not len(found):
        raise ValueError('it finds nothing, whatever the threshold')
    return found
