"""From maps to detections, in tensors: what the fast form runs and what export
records.

It follows mmdet 3.3 to the letter, but for the order of work: of each level
the best priors are found first, and only what passes the score threshold is
decoded. All images of a batch are decoded together: what belongs to them lies
in a row, R long, beside ``images``, the index of the image of each.

A recorded graph must not have sizes that depend on values. There, what does
not pass stays in its place with a score of -1, which NMS drops.
"""

import copy
import math
from contextlib import suppress
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Type

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmcv.ops import RoIAlign, batched_nms
from mmdet.models import (
    BaseDetector,
    CascadeRoIHead,
    SingleStageDetector,
    StandardRoIHead,
    TwoStageDetector,
)
from mmdet.models.dense_heads import GFLHead, RPNHead, RTMDetInsHead, YOLOXHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.structures import DetDataSample, SampleList
from mmdet.structures.bbox import bbox2roi
from mmdet.utils import InstanceList
from mmengine.structures import InstanceData
from torch import Tensor

from .blocks import FastTShapedConv
from .operators import FusedConv2d, FusedUpsample, Packed
from .precision import decodes_as
from .versions import check_torch

# Before 2.4, the operators below fail and do not say why.
check_torch('fasternet_det.deploy.decode')

# Most detections of an image in the graph of a YOLOX, which sets no
# max_per_img. COCO's AP reads 100.
MOST = 300


@torch.library.custom_op('fasternet_det::nms', mutates_args=())
def nms(
    boxes: Tensor,
    scores: Tensor,
    max_output: int,
    iou_threshold: float,
    score_threshold: float,
) -> Tensor:
    """Stand for ONNX's NonMaxSuppression-11 while a graph is recorded.

    Boxes (N, K, 4), scores (N, C, K), then its parameters in their order; the
    result, of shape (M, 3), holds N, C and K of what is kept.
    """
    raise NotImplementedError


@nms.register_fake
def _(boxes: Tensor, *_: object) -> Tensor:
    kept = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty((kept, 3), dtype=torch.int64)


@torch.library.custom_op('fasternet_det::roi_align', mutates_args=())
def roi_align(
    feature: Tensor,
    boxes: Tensor,
    images: Tensor,
    height: int,
    width: int,
    sampling_ratio: int,
    spatial_scale: float,
) -> Tensor:
    """Stand for ONNX's RoiAlign-16 while a graph is recorded.

    A map (N, C, H, W), boxes (R, 4) in pixels of the image and the index of
    their image (R,) make (R, C, height, width).
    """
    raise NotImplementedError


@roi_align.register_fake
def _(
    feature: Tensor,
    boxes: Tensor,
    images: Tensor,
    height: int,
    width: int,
    *_: object,
) -> Tensor:
    return feature.new_empty((boxes.shape[0], feature.shape[1], height, width))


# ---- what is known of a head


class UnknownError(ValueError):
    """A detector that decodes in a way that is not known here."""


def _expect(condition: bool, module: nn.Module, what: str) -> None:
    if not condition:
        raise UnknownError(
            f'cannot export the whole detector: expected a '
            f'{type(module).__name__} that {what}. Its backbone alone can be '
            'exported'
        )


def _check_methods(module: nn.Module, owner: type) -> None:
    """Expect a module to decode by the methods of a class of mmdet."""
    _expect(
        decodes_as(module, owner),
        module,
        f'predicts as a {owner.__name__} does',
    )


def _check_coder(head: nn.Module) -> None:
    coder = head.bbox_coder
    _expect(
        hasattr(coder, 'clip_border')  # LegacyDeltaXYWH's has none
        and coder.encode_size == 4  # mmrotate's have an angle too
        and not coder.use_box_type,
        head,
        'has a coder of boxes of four numbers, as tensors, that clips by '
        'clip_border, as mmdet 2 and later do',
    )


def _check_nms(head: nn.Module) -> None:
    cfg = head.test_cfg
    _expect(
        cfg.nms.type == 'nms'
        and {'iou_threshold'} < cfg.nms.keys()
        and cfg.nms.keys() <= {'type', 'iou_threshold', 'class_agnostic'},
        head,
        f'has a plain nms with iou_threshold, not {dict(cfg.nms)}',
    )
    _expect(
        cfg.get('max_per_img', MOST) > 0,
        head,
        'limits detections by max_per_img',
    )


# ---- steps of all heads


class Found(NamedTuple):
    """What was found in a batch, the images in a row, the best first.

    Of a recorded graph, all images have ``max_per_img`` places; a score of -1
    marks those that are empty.
    """

    images: Tensor  # (R,)
    boxes: Tensor  # (R, 4), corners in pixels
    scores: Tensor  # (R,)
    labels: Tensor  # (R,)
    masks: Optional[Tensor] = None  # (R, h, w)

    def rois(self) -> Tensor:
        """Image and corners, of shape (R, 5), as mmdet's extractors read."""
        return torch.cat((self.images[:, None], self.boxes), 1)


def _recording() -> bool:
    # Before torch 2.7, compiling and exporting are not told apart.
    compiler = torch.compiler
    return getattr(compiler, 'is_exporting', compiler.is_compiling)()


def _places(passing: Tensor) -> Tuple[Tensor, Tensor]:
    """Rows and columns of what is True; of all while recording."""
    if not _recording():
        return passing.nonzero().unbind(1)
    rows, columns = map(torch.arange, passing.shape)
    rows = rows[:, None].expand(passing.shape)
    return rows.flatten(), columns.expand(passing.shape).flatten()


def _best(scores: Tensor, passing: Tensor, most: int) -> Tuple[Tensor, Tensor]:
    """Scores and columns (N, k) of the best in each row (N, K).

    All that pass are among them, but for ``most``. While recording there are
    always as many, with scores of -1 where there is nothing.
    """
    if _recording():
        scores, index = F.pad(scores, (most, 0), value=-1).topk(most)
        return scores, (index - most).clamp(min=0)
    return scores.topk(min(most, int(passing.sum(1).max())))


def _take(values: Tensor, images: Tensor, index: Tensor) -> Tensor:
    """Of values (N, P, C) those of images and an index (K,): (K, C)."""
    index = images * values.shape[1] + index
    return values.flatten(0, 1).index_select(0, index)


def _clip(boxes: Tensor, sizes: Tensor, coder: nn.Module) -> Tensor:
    """Clip boxes (R, 4) to (R, 2) height and width, where a coder does."""
    if not coder.clip_border:
        return boxes
    return boxes.clamp(min=0).minimum(sizes.flip(1).repeat(1, 2))


def _select(
    found: Found,
    groups: Tensor,
    num_images: int,
    cfg: dict,
    most: Optional[int],
    least: float = -1,
) -> Tuple[Tensor, Found]:
    """NMS within images and groups; the best of an image.

    Args:
        found (Found): K boxes in any order; a score of -1 where there is
            nothing.
        groups (Tensor): Class or level, shape (K,).
        num_images (int): N.
        cfg (dict): Type and parameters of the NMS.
        most (int, optional): End of the slice that is kept of an image's; of
            a recorded graph, by default MOST.
        least (float): What both sides of a box exceed, in pixels; below 0,
            any do. Defaults to -1.

    Returns:
        tuple[Tensor, Found]: Indices into K, and what they are of.
    """
    images, boxes, scores, labels, _ = found
    if least >= 0:
        large = (boxes[:, 2:] - boxes[:, :2] > least).all(1)
        scores = scores.where(large, -1)
    # (N, K): every image has all boxes, and scores of its own.
    own = (
        images == torch.arange(num_images, device=images.device)[:, None]
    ) & (scores >= 0)
    if not _recording():
        kept = [boxes.new_zeros(0, dtype=torch.long)]
        nms_cfg = dict(cfg)
        if (
            boxes.device.type == 'cpu'
            and len(groups)
            and not cfg.get('class_agnostic', False)
        ):
            # Group by group is faster where many boxes are of few groups.
            few = 200 * int(groups.max() + 1)
            nms_cfg['split_thr'] = min(few, 10000)
        for rows in filter(len, (mask.nonzero()[:, 0] for mask in own)):
            of_image = (boxes[rows], scores[rows], groups[rows])
            dets, best = batched_nms(*of_image, nms_cfg)
            scores[rows[best]] = dets[:, 4]  # soft NMS changes them
            kept.append(rows[best[:most]])
        index = torch.cat(kept)
        return index, Found(
            *(x[index] for x in (images, boxes, scores, labels))
        )
    most, apart = most or MOST, boxes
    if not cfg.get('class_agnostic', False):
        # As in batched_nms, groups are out of each other's reach.
        ends = boxes.amax(1).where(own, 0).amax(1)  # (N,)
        apart = boxes + (groups * (ends[images] + 1))[:, None]
    _, images, index = nms(
        *(apart[None], scores.where(own, -1)[None]),
        *(most, cfg.iou_threshold, -0.5),
    ).unbind(1)
    # What was found, of all images in a row, beside `most` empty places
    places = torch.arange(num_images)[:, None]
    scores = scores[index].where(images == places, -1)  # (N, M)
    scores, order = F.pad(scores, (0, most), value=-1).topk(most)  # (N, most)
    index = F.pad(index, (0, most))[order].flatten()
    images = places.expand(order.shape).flatten()
    return index, Found(images, boxes[index], scores.flatten(), labels[index])


def _geometry(
    samples: SampleList, rescale: bool, device: torch.device
) -> Tuple[Tensor, Optional[Tensor]]:
    """Sizes (N, 2) of images, and factors (N, 4) back to the originals."""
    sizes = [sample.img_shape[:2] for sample in samples]
    sizes = torch.tensor(sizes, dtype=torch.float32, device=device)
    if not rescale:
        return sizes, None
    factors = [[1 / s for s in sample.scale_factor] * 2 for sample in samples]
    return sizes, torch.tensor(factors, dtype=torch.float32, device=device)


# ---- heads


class Decoder(nn.Module):
    """A head of mmdet that decodes in another way, and else is the same.

    Args:
        head (nn.Module): In eval mode.

    Raises:
        UnknownError: If the head decodes otherwise.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        cfg = head.test_cfg or {}
        _expect(bool(cfg.get('nms')), head, 'has a test_cfg with nms')
        self._check_parts()

    def __getattr__(self, name: str) -> Any:
        """What this is asked for and lacks, the head has."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__('head'), name)

    def forward(self, *args: Any) -> Any:
        """Compute what the head does."""
        return self.head(*args)

    def _check_parts(self) -> None:
        raise NotImplementedError

    def _results(
        self, found: Found, samples: SampleList, rescale: bool
    ) -> InstanceList:
        """Detections by image, as mmdet gives them."""
        counts = found.images.bincount(minlength=len(samples)).tolist()
        parts = zip(*(values.split(counts) for values in found[1:4]))
        results, first = [], 0
        for sample, (boxes, scores, labels) in zip(samples, parts):
            result = InstanceData(bboxes=boxes, scores=scores, labels=labels)
            if found.masks is not None:
                masks = found.masks[first : first + len(boxes)]
                result.masks = self._paste(masks, result, sample, rescale)
            results.append(result)
            first += len(boxes)
        return results


class DenseDecoder(Decoder):
    """For heads that decode as mmdet's ``BaseDenseHead``."""

    by_level = False  # of boxes that suppress each other: not by label

    def _check_parts(self) -> None:
        _expect(
            self.use_sigmoid_cls
            and not getattr(self.loss_cls, 'custom_cls_channels', False),
            self.head,
            'scores by sigmoid',
        )
        _expect(
            self.test_cfg.get('nms_pre', 0) > 0,
            self.head,
            'limits candidates by nms_pre',
        )
        _check_coder(self.head)

    def decode(
        self,
        maps: Sequence[Tensor],
        sizes: Tensor,
        factors: Optional[Tensor] = None,
    ) -> Found:
        """Detect.

        Args:
            maps (Sequence[Tensor]): Of the neck, (N, C, H, W) each.
            sizes (Tensor): Height and width of the images without padding,
                to which boxes are clipped, shape (N, 2).
            factors (Tensor, optional): What boxes are multiplied by before
                NMS, shape (N, 4). Defaults to None.
        """
        return self._decode(self(maps), sizes, factors)[0]

    def _decode(
        self, outs: Sequence[Any], sizes: Tensor, factors: Optional[Tensor]
    ) -> Tuple[Any, ...]:
        """Detections, and of each its prior, stride and further outputs."""
        generator, picked = self.prior_generator, []
        for i, level in enumerate(zip(*outs)):
            # (N, A * C, H, W) to (N, H * W * A, C), as priors are ordered
            num_images, _, height, width = level[0].shape
            each = generator.num_base_priors[i]
            shape = (num_images, height * width * each)
            level = [
                x.permute(0, 2, 3, 1).reshape(*shape, x.shape[1] // each)
                for x in level
            ]
            image, index, label, score = self._pick(*level)
            # ONNX's exporter knows no remainder by an int; and the generator's
            # anchors are on the CPU.
            size = [
                torch.tensor(side, device='cpu') for side in (height, width)
            ]
            prior = generator.sparse_priors(
                index.cpu(), size, i, torch.float32, index.device
            )
            picked.append(
                (image, label, torch.full_like(label, i), score, prior)
                + tuple(_take(x, image, index) for x in level[1:])
            )
        images, labels, levels, scores, priors, deltas, *others = map(
            torch.cat, zip(*picked)
        )
        strides = priors.new_tensor(generator.strides)[levels]  # (K, 2)
        boxes = self._boxes(priors, deltas, strides, sizes[images])
        if factors is not None:
            boxes = boxes * factors[images]
        index, found = _select(
            Found(images, boxes, scores, labels),
            levels if self.by_level else labels,
            sizes.shape[0],
            self.test_cfg.nms,
            *self._limits(),
        )
        return found, *(x[index] for x in (priors, strides, *others))

    def _limits(self) -> Tuple[Optional[int], float]:
        """What mmdet keeps: how many of an image, and of which size."""
        cfg = self.test_cfg
        return cfg.get('max_per_img'), cfg.get('min_bbox_size', -1)

    def _pick(
        self, logits: Tensor, deltas: Tensor, *factors: Tensor
    ) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        """The best pairs of a prior and a class, of one level.

        Args:
            logits (Tensor): Shape (N, P, C).
            deltas (Tensor): Shape (N, P, D).
            *factors (Tensor): None, or centerness of shape (N, P, 1).

        Returns:
            tuple[Tensor]: Images, priors, labels and scores, all (K,).
        """
        # mmdet's RPN knows no threshold
        threshold = (
            -0.5 if self.by_level else self.test_cfg.get('score_thr', 0)
        )
        most, (num_images, _, classes) = self.test_cfg.nms_pre, logits.shape
        # The best pairs are among those of the best priors.
        scores = logits.amax(2).sigmoid()
        if _recording():
            count = torch.sym_min(most, logits.shape[1])
            prior = scores.topk(count).indices
        else:
            prior = _best(scores, scores > threshold, most)[1]  # (N, k)
        image = torch.arange(num_images, device=prior.device)
        rows = image[:, None].expand(prior.shape)
        scores = _take(logits, rows.flatten(), prior.flatten()).sigmoid()
        scores = scores.view(num_images, prior.shape[1] * classes)
        scores, pair = _best(scores, scores > threshold, most)  # (N, k)
        prior, label = prior.gather(1, pair // classes), pair % classes
        passing = scores > threshold
        for factor in factors:
            scores = scores * factor[..., 0].gather(1, prior).sigmoid()
        place = _places(passing)
        scores = scores.where(passing, -1)
        return place[0], prior[place], label[place], scores[place]

    def _boxes(
        self, priors: Tensor, deltas: Tensor, strides: Tensor, sizes: Tensor
    ) -> Tensor:
        """Boxes of priors (K, 2 or 4), deltas (K, D) and strides (K, 2)."""
        boxes = self.bbox_coder.decode(priors, deltas)
        return _clip(boxes, sizes, self.bbox_coder)

    def predict(
        self, x: Sequence[Tensor], samples: SampleList, rescale: bool = False
    ) -> InstanceList:
        """Detect; see :meth:`BaseDenseHead.predict`."""
        found = self.decode(x, *_geometry(samples, rescale, x[0].device))
        return self._results(found, samples, rescale)


class RPNDecoder(DenseDecoder):
    """For mmdet's ``RPNHead``, which suppresses by level."""

    by_level = True

    def forward(self, maps: Sequence[Tensor]) -> Tuple[List[Tensor], ...]:
        """Compute what the head does, no ReLU twice."""
        conv = self.rpn_conv
        if not (
            isinstance(conv, (Packed, FastTShapedConv))
            and isinstance(conv.activation, nn.ReLU)
        ):
            return super().forward(maps)
        outs = [
            (self.rpn_cls(x), self.rpn_reg(x))
            for x in map(self.rpn_conv, maps)
        ]
        scores, deltas = zip(*outs)
        return list(scores), list(deltas)


class GFLDecoder(DenseDecoder):
    """For mmdet's ``GFLHead``, which predicts distributions of distances."""

    def _boxes(
        self, priors: Tensor, deltas: Tensor, strides: Tensor, sizes: Tensor
    ) -> Tensor:
        centers = self.anchor_center(priors)
        distances = self.integral(deltas) * strides[:, :1]
        return super()._boxes(centers, distances, strides, sizes)


class YOLOXDecoder(DenseDecoder):
    """For mmdet's ``YOLOXHead``: one class a prior, no clipping, no limits."""

    def _check_parts(self) -> None:
        pass

    def _limits(self) -> Tuple[Optional[int], float]:
        return None, -1

    def _pick(
        self, logits: Tensor, deltas: Tensor, objectness: Tensor
    ) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        scores, labels = logits.max(2)
        scores = scores.sigmoid() * objectness[..., 0].sigmoid()
        passing = scores >= self.test_cfg.score_thr
        place = _places(passing)
        return *place, labels[place], scores.where(passing, -1)[place]

    def _boxes(
        self, priors: Tensor, deltas: Tensor, strides: Tensor, sizes: Tensor
    ) -> Tensor:
        return self._bbox_decode(torch.cat((priors, strides), 1), deltas)


class RTMDetInsDecoder(DenseDecoder):
    """For mmdet's ``RTMDetInsHead``, which predicts a net for each mask."""

    def decode(
        self,
        maps: Sequence[Tensor],
        sizes: Tensor,
        factors: Optional[Tensor] = None,
    ) -> Found:
        """Detect; masks are logits on a grid over the padded image."""
        *outs, features = self(maps)
        found, *nets = self._decode(outs, sizes, factors)
        return found._replace(masks=self._masks(features, found.images, *nets))

    def _pick(
        self, logits: Tensor, deltas: Tensor, kernels: Tensor
    ) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        return super()._pick(logits, deltas)

    def _masks(
        self,
        features: Tensor,
        images: Tensor,
        priors: Tensor,
        strides: Tensor,
        kernels: Tensor,
    ) -> Tensor:
        """Logits (R, H, W) of features (N, C, H, W) by nets (R, weights)."""
        count, size = images.shape[0], features.shape[2:]
        if count == 0:
            return features.new_zeros(0, *size)
        points = self.prior_generator.single_level_grid_priors(
            size, level_idx=0, device=features.device
        )
        apart = (priors[:, None] - points) / (strides[:, None, :1] * 8)
        x = (apart.transpose(1, 2), features.flatten(2)[images])
        x = torch.cat(x, 1)  # (R, 2 + C, H * W)
        layers = zip(*self.parse_dynamic_params(kernels))
        for i, (weight, bias) in enumerate(layers):
            x = x if i == 0 else x.relu()
            weight = weight.reshape(count, -1, x.shape[1])
            x = torch.baddbmm(bias.reshape(count, -1, 1), weight, x)
        return x.reshape(count, *size)

    def _paste(
        self,
        logits: Tensor,
        result: InstanceData,
        sample: DetDataSample,
        rescale: bool,
    ) -> Tensor:
        """Masks of logits, as ``_bbox_mask_post_process`` makes them."""
        if len(logits) == 0:
            shape = sample.ori_shape if rescale else sample.img_shape
            return logits.new_zeros((0, *shape[:2]), dtype=torch.bool)
        stride = self.prior_generator.strides[0][0]
        x = F.interpolate(logits[None], scale_factor=stride, mode='bilinear')
        if rescale:
            factors = [1 / factor for factor in sample.scale_factor]
            size = [math.ceil(a * b) for a, b in zip(x.shape[2:], factors)]
            height, width = sample.ori_shape[:2]
            x = F.interpolate(x, size, mode='bilinear')[..., :height, :width]
        threshold = self.test_cfg.mask_thr_binary
        return x[0] > math.log(threshold / (1 - threshold))


def _listed(module: nn.Module) -> List[nn.Module]:
    """The stages of a part, which is one in a ``StandardRoIHead``."""
    return list(module) if isinstance(module, nn.ModuleList) else [module]


def _predicts_by_class(head: nn.Module) -> bool:
    """Whether ``fuse`` knows all of a mask head, its activation included."""
    return (
        isinstance(head.upsample, FusedUpsample)
        and isinstance(head.upsample.activation, nn.ReLU)
        and type(head.conv_logits) is FusedConv2d
    )


class RoIDecoder(Decoder):
    """For mmdet's ``StandardRoIHead`` and ``CascadeRoIHead``."""

    def _check_parts(self) -> None:
        _expect(not self.head.with_shared_head, self.head, 'shares no head')
        for head in _listed(self.bbox_head):
            _check_methods(head, BBoxHead)
            _check_coder(head)
            _expect(
                head.with_reg
                and not head.custom_cls_channels
                and not head.custom_activation,
                head,
                'predicts boxes, and scores by softmax',
            )
        for head in _listed(self.mask_head) if self.with_mask else []:
            _check_methods(head, FCNMaskHead)

    def decode(
        self,
        maps: Sequence[Tensor],
        rois: Tensor,
        real: Tensor,
        sizes: Tensor,
        factors: Optional[Tensor] = None,
    ) -> Found:
        """Detect in regions.

        Args:
            maps (Sequence[Tensor]): Of the neck, (N, C, H, W) each.
            rois (Tensor): Image and corners in pixels, shape (R, 5).
            real (Tensor): False for empty places, shape (R,).
            sizes (Tensor): See :meth:`DenseDecoder.decode`.
            factors (Tensor, optional): As there. Defaults to None.

        Returns:
            Found: Its masks are probabilities on a grid over each box.
        """
        images, cfg = rois[:, 0].long(), self.test_cfg
        extractors = _listed(self.bbox_roi_extractor)
        heads = _listed(self.bbox_head)
        total = 0
        for i, (extractor, head) in enumerate(zip(extractors, heads)):
            logits, deltas = head(
                extractor(maps[: extractor.num_inputs], rois)
            )
            total = total + logits
            if i < len(heads) - 1:
                labels = logits[:, :-1].argmax(1)
                boxes = head.regress_by_class(
                    rois[:, 1:], labels, deltas, dict(img_shape=None)
                )
                boxes = _clip(boxes, sizes[images], head.bbox_coder)
                rois = torch.cat((rois[:, :1], boxes), 1)
        scores = (total / len(heads)).softmax(1)[:, :-1]
        passing = (scores > cfg.score_thr) & real[:, None]
        place = region, labels = _places(passing)
        deltas = (
            deltas[region]
            if head.reg_class_agnostic
            else deltas.unflatten(1, (-1, 4))[place]
        )
        images = images[region]
        boxes = head.bbox_coder.decode(rois[region, 1:], deltas)
        boxes = _clip(boxes, sizes[images], head.bbox_coder)
        if factors is not None:
            boxes = boxes * factors[images]
        scores = scores.where(passing, -1)[place]
        found = Found(images, boxes, scores, labels)
        most = cfg.max_per_img if cfg.max_per_img > 0 else None
        _, found = _select(found, labels, sizes.shape[0], cfg.nms, most)
        if not self.with_mask:
            return found
        return found._replace(masks=self._masks(maps, found))

    def _masks(self, maps: Sequence[Tensor], found: Found) -> Tensor:
        """Probabilities (R, h, w), the mean over the stages."""
        images, rois = found.images, found.rois()
        rows = torch.arange(images.shape[0], device=images.device)
        if rows.shape[0] == 0:
            return found.scores[:, None, None]
        total, heads = 0, _listed(self.mask_head)
        for extractor, head in zip(_listed(self.mask_roi_extractor), heads):
            x = extractor(maps[: extractor.num_inputs], rois)
            channels = found.labels * (not head.class_agnostic)
            if _predicts_by_class(head):
                for conv in head.convs:
                    x = conv(x)
                logits = head.upsample.logits(x, head.conv_logits, channels)
            else:
                logits = head(x)[rows, channels]
            total = total + logits.float().sigmoid()
        return total / len(heads)

    def predict(
        self,
        x: Sequence[Tensor],
        rpn_results_list: InstanceList,
        samples: SampleList,
        rescale: bool = False,
    ) -> InstanceList:
        """Detect; see :meth:`BaseRoIHead.predict`."""
        rois = bbox2roi([proposals.bboxes for proposals in rpn_results_list])
        # Masks are pasted, and boxes enlarged then.
        sizes, factors = _geometry(
            samples, rescale and not self.with_mask, rois.device
        )
        real = torch.ones_like(rois[:, 0], dtype=torch.bool)
        found = self.decode(x, rois, real, sizes, factors)
        return self._results(found, samples, rescale)

    def _paste(
        self,
        masks: Tensor,
        result: InstanceData,
        sample: DetDataSample,
        rescale: bool,
    ) -> Tensor:
        """Masks of probabilities; boxes are rescaled in place."""
        if len(masks) == 0:
            shape = (0, *sample.ori_shape[:2])
            return masks.new_zeros(shape, dtype=torch.bool)
        return _listed(self.mask_head)[-1]._predict_by_feat_single(
            masks[:, None].cpu().numpy(),  # copied; of tensors, it warns
            result.bboxes,
            torch.zeros_like(result.labels),  # the only channel
            sample.metainfo,
            self.test_cfg,
            rescale,
            activate_map=True,
        )


# What decodes a head of mmdet, and its subclasses that predict as it does.
DECODERS: Dict[type, Type[Decoder]] = {
    BaseDenseHead: DenseDecoder,  # RetinaNet, FSAF, FCOS, ATSS, RTMDet, ...
    RPNHead: RPNDecoder,
    GFLHead: GFLDecoder,
    YOLOXHead: YOLOXDecoder,
    RTMDetInsHead: RTMDetInsDecoder,
    StandardRoIHead: RoIDecoder,
    CascadeRoIHead: RoIDecoder,
}


def _decoder(head: nn.Module) -> Decoder:
    """What decodes a head, or an UnknownError."""
    owner = next((t for t in type(head).__mro__ if t in DECODERS), None)
    names = ', '.join(t.__name__ for t in DECODERS)
    _expect(owner is not None, head, f'derives from one of {names}')
    _check_methods(head, owner)
    return DECODERS[owner](head)


def decode_heads(detector: nn.Module) -> nn.Module:
    """Let the heads of a detector decode by what is known here.

    Args:
        detector (nn.Module): In eval mode. Its ``bbox_head``, ``rpn_head``
            and ``roi_head`` are replaced, each if it is known, by what
            predicts the same and has the same attributes.

    Returns:
        nn.Module: The detector.
    """
    if isinstance(detector, (SingleStageDetector, TwoStageDetector)):
        for name in ('bbox_head', 'rpn_head', 'roi_head'):
            if getattr(detector, name, None) is not None:
                with suppress(UnknownError):
                    setattr(detector, name, _decoder(getattr(detector, name)))
    return detector


# ---- export


class ExportedExtractor(nn.Module):
    """A RoI extractor in ONNX's operators.

    Args:
        extractor (SingleRoIExtractor): Of averaging, aligned RoIAligns.
    """

    def __init__(self, extractor: SingleRoIExtractor) -> None:
        super().__init__()
        layers = extractor.roi_layers
        _expect(
            type(extractor) is SingleRoIExtractor
            and all(
                isinstance(layer, RoIAlign)
                and layer.aligned
                and layer.pool_mode == 'avg'
                for layer in layers
            ),
            extractor,
            'is a SingleRoIExtractor of averaging, aligned RoIAligns',
        )
        self.extractor = extractor
        self.num_inputs = extractor.num_inputs

    def forward(self, maps: Sequence[Tensor], rois: Tensor) -> Tensor:
        """Features (R, C, h, w) of regions (R, 5), each of its level."""
        images, boxes = rois[:, 0].long(), rois[:, 1:]
        levels = self.extractor.map_roi_levels(rois, len(maps))
        features = []
        for i, layer in enumerate(self.extractor.roi_layers):
            rows = (levels == i).nonzero().squeeze(1)
            features.append(
                roi_align(
                    maps[i],
                    boxes[rows],
                    images[rows],
                    *layer.output_size,
                    layer.sampling_ratio,
                    layer.spatial_scale,
                )
            )
        # from the order of levels back to that of the regions
        count = levels.shape[0]
        by_level = levels * count + torch.arange(count)
        return torch.cat(features)[by_level.argsort().argsort()]


class EndToEnd(nn.Module):
    """A detector from images to boxes and masks, to be exported.

    ``names`` are those of what it returns.

    Args:
        detector (BaseDetector): In eval mode, one-stage or two-stage. It is
            left as it is.

    Raises:
        ValueError: If it decodes in a way that is not known here.
    """

    def __init__(self, detector: BaseDetector) -> None:
        super().__init__()
        self.two_stages = isinstance(detector, TwoStageDetector)
        _check_methods(
            detector,
            TwoStageDetector if self.two_stages else SingleStageDetector,
        )
        self.detector = copy.deepcopy(detector)
        heads = ('rpn_head', 'roi_head') if self.two_stages else ('bbox_head',)
        for name in heads:
            head = getattr(self.detector, name, None)
            _expect(head is not None, detector, f'has a {name}')
            head = _decoder(head)
            _check_nms(head.head)
            setattr(self.detector, name, head)
        with_masks = isinstance(head, RTMDetInsDecoder)
        if self.two_stages:
            with_masks = head.with_mask
            for kind in ('bbox', 'mask')[: 1 + with_masks]:
                name = f'{kind}_roi_extractor'
                extractors = map(
                    ExportedExtractor, _listed(getattr(head, name))
                )
                setattr(head.head, name, nn.ModuleList(extractors))
        self.names = ('dets', 'labels', 'masks')[: 2 + with_masks]

    def forward(
        self, images: Tensor, size: Optional[Sequence[int]] = None
    ) -> Tuple[Tensor, ...]:
        """Detect.

        Args:
            images (Tensor): Normalised images of shape (N, 3, H, W).
            size (Sequence[int], optional): Height and width without padding.
                Defaults to None, H and W.

        Returns:
            tuple[Tensor]: ``dets`` (N, max_per_img, 5), corners in pixels and
            score, best first, and ``labels`` (N, max_per_img). Where less is
            found, zeros of label -1 follow. Of a detector with masks,
            ``masks`` (N, max_per_img, h, w): probabilities on a grid over
            each box, or, of RTMDet-Ins, logits on one over the image.
        """
        num_images = images.shape[0]
        sizes = [
            torch.full((num_images,), side)
            for side in size or images.shape[2:]
        ]
        sizes = torch.stack(sizes, 1).to(images.dtype)  # (N, 2)
        maps = self.detector.extract_feat(images)
        if self.two_stages:
            regions = self.detector.rpn_head.decode(maps, sizes)
            real = regions.scores >= 0
            found = self.detector.roi_head.decode(
                maps, regions.rois(), real, sizes
            )
        else:
            found = self.detector.bbox_head.decode(maps, sizes)
        real = found.scores >= 0
        dets = torch.cat((found.boxes, found.scores[:, None]), 1)
        outputs = [dets.where(real[:, None], 0), found.labels.where(real, -1)]
        if found.masks is not None:
            outputs.append(found.masks)
        return tuple(x.unflatten(0, (num_images, -1)) for x in outputs)
