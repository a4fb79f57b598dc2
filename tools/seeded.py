"""Models with seeded weights and made-up images, run and compared.

For tools that have neither data nor trained weights.
"""

import copy
import math
import zlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Callable, Dict, List, Optional, Sequence

import numpy as np
import torch
import torch.nn as nn
from get_flops import count_flops
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_overlaps
from mmengine.structures import InstanceData
from torch import Tensor

from fasternet_det import ConvAWS2d

# An image of 427x640 pixels is enlarged so much to fit 1333x800.
SCALE = 1.873
# The last layers of heads, on maps of standard deviation 30, FPN's of up to
# 100: boxes stay near their anchors, and scores do not saturate, so that none
# are equal. And what SAConv multiplies its map with: else it squares, layer by
# layer, to infinity.
GAINS = {
    **{'_reg.': 0.01, 'rpn_cls.': 0.02, 'retina_cls.': 0.02, '_cls.': 0.1},
    **{'switch.': 0.01, '_context.': 0.1},
}
# Strides from a point to the sides of its box, for the heads that predict
# them: around 0, every other box would end before it starts.
DISTANCES = {'rtm_reg.': 4}
CANDIDATES = 1000  # boxes and classes that pass the threshold into NMS


def fill(module: nn.Module) -> nn.Module:
    """Seed all weights and statistics by their names.

    No norm is then an identity, and all copies of a model agree.
    """

    def of(values: Dict[str, float], name: str, default: float) -> float:
        return next((v for k, v in values.items() if k in name), default)

    for name, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        normal = torch.randn(tensor.shape, generator=generator)
        if name.endswith(('bias', 'running_mean')):
            value = 0.1 * normal + of(DISTANCES, name, 0)
        elif tensor.dim() >= 2:
            gain = of(GAINS, name, 1)
            value = gain * normal / tensor[0].numel() ** 0.5
        else:  # scales and variances
            value = torch.rand(tensor.shape, generator=generator) + 0.5
        tensor.copy_(value)
    for layer in module.modules():
        if isinstance(layer, ConvAWS2d):  # else its filters are enormous
            layer.weight_gamma.div_(layer.weight[0].numel() ** 0.5)
            layer.weight_beta.div_(layer.weight[0].numel())
    return module


@dataclass
class Model:
    """A plain module with its weights and its input, in one of two kinds."""

    name: str
    module: nn.Module
    inputs: Tensor
    samples: Optional[List[DetDataSample]] = None  # of a detector
    config: Optional[str] = None

    def run_of(self, module: nn.Module) -> Callable[[], Any]:
        """What is timed: inference of a form of the module."""
        if self.samples is None:
            return lambda: module(self.inputs)
        samples = copy.deepcopy(self.samples)
        return lambda: module.predict(self.inputs, samples, rescale=True)

    def maps_of(self, module: nn.Module) -> Sequence[Tensor]:
        """Feature maps, of the backbone or of a detector's neck."""
        if self.samples is None:
            return module(self.inputs)
        return module.extract_feat(self.inputs)

    @cached_property
    def flops(self) -> int:
        """Multiply-adds of the plain module."""
        return count_flops(self.run_of(self.module))

    def calibration(self) -> List[Any]:
        """The input, of a detector as ``test_step`` takes it."""
        if self.samples is None:
            return [self.inputs]
        preprocessor, images = self.module.data_preprocessor, self.inputs
        if preprocessor._enable_normalize:
            images = images * preprocessor.std + preprocessor.mean
        if preprocessor._channel_conversion:
            images = images.flip(1)
        samples = copy.deepcopy(self.samples)
        return [dict(inputs=list(images), data_samples=samples)]

    def found_by(self, module: nn.Module) -> List[InstanceData]:
        """What a detector finds in each image; nothing, of a backbone."""
        if self.samples is None:
            return []
        return [copy.copy(s.pred_instances) for s in self.run_of(module)()]


def detector_samples(size: Sequence[int], batch: int) -> List[DetDataSample]:
    """Data samples as mmdet's pipelines make of COCO images, with ten boxes of
    a tenth to a half of the image as their truth.
    """
    height, width = size
    generator, samples = torch.Generator().manual_seed(0), []
    for _ in range(batch):
        sample = DetDataSample()
        sample.set_metainfo(
            dict(
                img_shape=(height, width),
                pad_shape=(height, width),
                batch_input_shape=(height, width),
                ori_shape=(round(height / SCALE), round(width / SCALE)),
                scale_factor=(SCALE, SCALE),
            )
        )
        corner, extent = torch.rand(2, 10, 2, generator=generator) / 2
        boxes = torch.cat((corner, corner + 0.1 + 0.8 * extent), 1)
        sample.gt_instances = InstanceData(
            bboxes=boxes * torch.tensor([width, height] * 2),
            labels=torch.zeros(10, dtype=torch.long),
        )
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4))
        samples.append(sample)
    return samples


def set_threshold(model: Model) -> None:
    """Set the score threshold so that ``CANDIDATES`` boxes per image pass.

    Seeded weights score boxes as they like; a trained detector passes some
    hundreds on to the NMS.
    """
    detector = model.module
    owner = getattr(detector, 'roi_head', None) or detector.bbox_head
    head = getattr(owner, 'bbox_head', owner)
    seen: List[Any] = []
    hook = head.register_forward_hook(lambda _, args, out: seen.append(out[0]))
    model.run_of(detector)()
    hook.remove()
    if not seen:
        raise ValueError(
            f'{model.name}: the scores of a {type(head).__name__} are not '
            'understood; name a --checkpoint'
        )
    if isinstance(seen[0], Tensor):  # (rois, classes and background)
        scores = seen[0].softmax(-1)[:, :-1]
    else:  # per level
        scores = torch.cat([score.flatten() for score in seen[0]]).sigmoid()
    count = min(CANDIDATES * len(model.inputs), scores.numel())
    owner.test_cfg.score_thr = scores.flatten().topk(count).values[-1].item()


def difference(
    outputs: Sequence[Tensor], reference: Sequence[Tensor]
) -> float:
    """Largest difference between maps, relative to the largest value."""
    shapes = [tuple(x.shape) for x in outputs]
    expected = [tuple(x.shape) for x in reference]
    if shapes != expected:
        raise ValueError(f'has the shapes {shapes}, expected {expected}')
    worst = np.max(  # also of not a number
        [
            float((x.float() - y.float()).abs().max() / y.float().abs().max())
            for x, y in zip(outputs, reference)
        ]
    )
    if not math.isfinite(worst):
        raise ValueError('has values that are not finite')
    return float(worst)


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
