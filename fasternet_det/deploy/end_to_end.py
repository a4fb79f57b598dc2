"""Whole detectors, decoding and NMS included, as one graph of tensors."""

from typing import Sequence, Tuple, Union

import torch
import torch.nn as nn
from mmcv.ops import RoIAlign
from mmdet.models import (
    BaseDetector,
    SingleStageDetector,
    StandardRoIHead,
    TwoStageDetector,
)
from mmdet.models.dense_heads import RPNHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from torch import Tensor


@torch.library.custom_op('fasternet_det::nms', mutates_args=())
def nms(
    boxes: Tensor,
    scores: Tensor,
    max_output: int,
    iou_threshold: float,
    score_threshold: float,
) -> Tensor:
    """Stand for ONNX's NonMaxSuppression while a graph is recorded.

    Args:
        boxes (Tensor): Corners in pixels, of shape (N, K, 4).
        scores (Tensor): Shape (N, 1, K).
        max_output (int): Most boxes to keep of an image.
        iou_threshold (float): Boxes that overlap a better one more than that
            are dropped.
        score_threshold (float): Boxes must score higher than that.

    Returns:
        Tensor: Image, 0, and box of what is kept, shape (M, 3), int64.
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
    """Stand for ONNX's RoiAlign while a graph is recorded.

    Args:
        feature (Tensor): Feature map of shape (N, C, H, W).
        boxes (Tensor): Corners in pixels of the image, of shape (R, 4).
        images (Tensor): Which of the N images each box is of, shape (R,).
        height (int): Rows of the output.
        width (int): Columns of the output.
        sampling_ratio (int): Points a bin and axis; 0 adapts to the box.
        spatial_scale (float): Pixels of the map for one of the image.

    Returns:
        Tensor: Shape (R, C, height, width).
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


def _expect(condition: bool, module: nn.Module, what: str) -> None:
    if not condition:
        raise ValueError(
            f'cannot export the whole detector: expected a '
            f'{type(module).__name__} that {what}. Its backbone alone can be '
            'exported'
        )


def _inherits(module: nn.Module, owner: type, *names: str) -> bool:
    """Whether a module computes these as a class of mmdet does."""
    return all(
        getattr(type(module), name, None) is getattr(owner, name)
        for name in names
    )


def _check_nms(module: nn.Module, cfg: dict) -> None:
    _expect(
        cfg.nms.keys() == {'type', 'iou_threshold'} and cfg.nms.type == 'nms',
        module,
        f'has a plain nms with iou_threshold, not {dict(cfg.nms)}',
    )
    _expect(
        cfg.get('min_bbox_size', 0) <= 0,
        module,
        'keeps boxes of any size (min_bbox_size=0)',
    )


def _check_dense_head(head: BaseDenseHead, owner: type, cfg: dict) -> None:
    _expect(
        isinstance(head, BaseDenseHead)
        and _inherits(head, BaseDenseHead, 'predict_by_feat')
        and _inherits(
            head, owner, '_predict_by_feat_single', '_bbox_post_process'
        ),
        head,
        f'predicts as a {owner.__name__} does',
    )
    _expect(
        head.use_sigmoid_cls
        and not getattr(head.loss_cls, 'custom_cls_channels', False),
        head,
        'scores by sigmoid',
    )
    _expect(cfg.get('nms_pre', 0) > 0, head, 'limits candidates by nms_pre')
    _check_nms(head, cfg)


def _check_roi_head(head: StandardRoIHead, cfg: dict) -> None:
    _expect(
        type(head) is StandardRoIHead and not head.with_shared_head,
        head,
        'is a StandardRoIHead without shared_head',
    )
    bbox_head = head.bbox_head
    _expect(
        _inherits(
            bbox_head, BBoxHead, 'predict_by_feat', '_predict_by_feat_single'
        )
        and bbox_head.with_reg
        and not bbox_head.reg_class_agnostic
        and not bbox_head.custom_cls_channels,
        bbox_head,
        'predicts scores by softmax and boxes of every class',
    )
    extractors = [head.bbox_roi_extractor]
    if head.with_mask:
        extractors.append(head.mask_roi_extractor)
        _expect(
            type(head.mask_head) is FCNMaskHead,
            head.mask_head,
            'is an FCNMaskHead',
        )
    for extractor in extractors:
        _expect(
            type(extractor) is SingleRoIExtractor
            and all(
                isinstance(layer, RoIAlign)
                and layer.aligned
                and layer.pool_mode == 'avg'
                for layer in extractor.roi_layers
            ),
            extractor,
            'is a SingleRoIExtractor of averaging, aligned RoIAligns',
        )
    _check_nms(bbox_head, cfg)


def _candidates(
    head: BaseDenseHead, maps: Tuple[Tensor, ...], nms_pre: int
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The ``nms_pre`` best pairs of a prior and a class, of every level.

    Returns:
        tuple: With K the pairs of all levels: scores (N, K), labels (N, K),
        levels (K,), priors (N, K, 2 or 4) and deltas (N, K, 4).
    """
    logits, deltas, *factors = head(maps)
    _expect(not factors, head, 'gives scores and boxes, and nothing else')
    priors = head.prior_generator.grid_priors(
        [level.shape[-2:] for level in logits], device=maps[0].device
    )
    kept = []
    for i, (logit, delta, prior) in enumerate(zip(logits, deltas, priors)):
        # (N, A * C, H, W) to (N, H * W * A * C), as the priors are ordered
        logit = logit.permute(0, 2, 3, 1).flatten(1)
        delta = delta.permute(0, 2, 3, 1).reshape(delta.shape[0], -1, 4)
        logit, pair = logit.topk(torch.sym_min(nms_pre, logit.shape[1]))
        index, label = (
            pair // head.cls_out_channels,
            pair % head.cls_out_channels,
        )
        kept.append(
            (
                logit.sigmoid(),
                label,
                torch.full_like(label[0], i),
                prior[index],
                _take(delta, index),
            )
        )
    scores, labels, levels, priors, deltas = zip(*kept)
    return (
        torch.cat(scores, 1),
        torch.cat(labels, 1),
        torch.cat(levels),
        torch.cat(priors, 1),
        torch.cat(deltas, 1),
    )


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Of values (N, K, 4), those at an index (N, M): (N, M, 4)."""
    return values.gather(1, index[..., None].expand(-1, -1, 4))


def _decode(
    coder: nn.Module, priors: Tensor, deltas: Tensor, size: Sequence[int]
) -> Tensor:
    """Boxes (N, K, 4) of priors and deltas, clipped to (H, W)."""
    boxes = coder.decode(priors.flatten(0, 1), deltas.flatten(0, 1))
    boxes = boxes.view(deltas.shape)
    if not coder.clip_border:
        return boxes
    corners = (boxes[..., axis::2].clamp(0, size[1 - axis]) for axis in (0, 1))
    return torch.stack(tuple(corners), -1).flatten(-2)


def _select(
    boxes: Tensor, scores: Tensor, groups: Tensor, cfg: dict, score_thr: float
) -> Tuple[Tensor, Tensor, Tensor]:
    """NMS within groups; the ``max_per_img`` best of an image, best first.

    Args:
        boxes (Tensor): Shape (N, K, 4).
        scores (Tensor): Shape (N, K).
        groups (Tensor): Class or level, shape (N, K) or (K,).
        cfg (dict): ``nms``, ``max_per_img`` and ``min_bbox_size``.
        score_thr (float): Scores must be higher than that.

    Returns:
        tuple[Tensor]: Boxes (N, max_per_img, 4), scores and indices into K,
        both (N, max_per_img). Where less is found, zeros follow.
    """
    if cfg.get('min_bbox_size', -1) >= 0:
        scores = scores * (boxes[..., 2:] > boxes[..., :2]).all(-1)
    # As in mmcv's batched_nms, groups are moved out of each other's reach.
    offsets = groups * (boxes.max() + 1)
    most = cfg.max_per_img
    image, _, index = nms(
        boxes + offsets[..., None],
        scores[:, None],
        most,
        cfg.nms.iou_threshold,
        score_thr,
    ).unbind(1)
    # What was found, of all images in a row, beside `most` empty places
    found = scores.flatten()[image * scores.shape[1] + index]
    own = image == torch.arange(scores.shape[0])[:, None]
    scores = torch.where(own, found, 0)
    scores, order = nn.functional.pad(scores, (0, most)).topk(most)
    index = nn.functional.pad(index, (0, most))[order]
    boxes = _take(boxes, index) * (scores > 0)[..., None]
    return boxes, scores, index


class OneStage(nn.Module):
    """A one-stage detector such as RetinaNet or RTMDet, from image to boxes.

    Args:
        detector (SingleStageDetector): In eval mode.
    """

    names = ('dets', 'labels')

    def __init__(self, detector: SingleStageDetector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> Tuple[Tensor, Tensor]:
        """Detect.

        Args:
            images (Tensor): Normalised images of shape (N, 3, H, W).

        Returns:
            tuple[Tensor]: ``dets`` (N, max_per_img, 5), corners in pixels and
            score, best first, and ``labels`` (N, max_per_img). Where less is
            found, zeros of label -1 follow.
        """
        head, cfg = self.detector.bbox_head, self.detector.test_cfg
        scores, labels, _, priors, deltas = _candidates(
            head, self.detector.extract_feat(images), cfg.nms_pre
        )
        boxes = _decode(head.bbox_coder, priors, deltas, images.shape[-2:])
        boxes, scores, index = _select(
            boxes, scores, labels, cfg, cfg.score_thr
        )
        labels = torch.where(scores > 0, labels.gather(1, index), -1)
        return torch.cat((boxes, scores[..., None]), -1), labels


def _extract(
    extractor: SingleRoIExtractor, maps: Tuple[Tensor, ...], boxes: Tensor
) -> Tensor:
    """Features (N * K, C, h, w) of boxes (N, K, 4), each of its level."""
    images = torch.arange(boxes.shape[0])[:, None].expand(-1, boxes.shape[1])
    images, boxes = images.flatten(), boxes.flatten(0, 1)
    layers = extractor.roi_layers
    levels = extractor.map_roi_levels(
        torch.cat((images[:, None], boxes), 1), len(layers)
    )
    features = []
    for i, layer in enumerate(layers):
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
    # from the order of levels back to that of the boxes
    count = levels.shape[0]
    by_level = levels * count + torch.arange(count)
    return torch.cat(features)[by_level.argsort().argsort()]


class TwoStage(nn.Module):
    """Faster R-CNN or Mask R-CNN, from image to boxes and masks.

    Args:
        detector (TwoStageDetector): In eval mode.
    """

    def __init__(self, detector: TwoStageDetector) -> None:
        super().__init__()
        self.detector = detector
        self.names = ('dets', 'labels', 'masks')[: 2 + detector.with_mask]

    def forward(self, images: Tensor) -> Tuple[Tensor, ...]:
        """Detect.

        Args:
            images (Tensor): Normalised images of shape (N, 3, H, W).

        Returns:
            tuple[Tensor]: As of :class:`OneStage`, and, of a detector with
            masks, probabilities on a grid over each box, ``masks`` of shape
            (N, max_per_img, h, w).
        """
        size = images.shape[-2:]
        maps = self.detector.extract_feat(images)
        rpn, cfg = self.detector.rpn_head, self.detector.test_cfg
        scores, _, levels, priors, deltas = _candidates(
            rpn, maps, cfg.rpn.nms_pre
        )
        boxes = _decode(rpn.bbox_coder, priors, deltas, size)
        rois, objectness, _ = _select(boxes, scores, levels, cfg.rpn, 0)

        roi_head, cfg = self.detector.roi_head, cfg.rcnn
        head = roi_head.bbox_head
        logits, deltas = head(
            _extract(roi_head.bbox_roi_extractor, maps, rois)
        )
        num_images, num_rois = objectness.shape
        scores = logits.softmax(-1)[:, :-1].view(
            num_images, num_rois, head.num_classes
        )
        scores = (scores * (objectness > 0)[..., None]).flatten(1)
        boxes = _decode(
            head.bbox_coder,
            rois.repeat_interleave(head.num_classes, 1),
            deltas.view(num_images, num_rois * head.num_classes, 4),
            size,
        )
        labels = torch.arange(head.num_classes).repeat(num_rois)
        boxes, scores, index = _select(
            boxes, scores, labels, cfg, cfg.score_thr
        )
        labels = labels[index]
        outputs = (
            torch.cat((boxes, scores[..., None]), -1),
            torch.where(scores > 0, labels, -1),
        )
        if not self.detector.with_mask:
            return outputs
        masks = roi_head.mask_head(
            _extract(roi_head.mask_roi_extractor, maps, boxes)
        ).sigmoid()
        rows = torch.arange(masks.shape[0])
        if roi_head.mask_head.class_agnostic:
            labels = labels * 0
        masks = masks[rows, labels.flatten()]
        return *outputs, masks.unflatten(0, labels.shape)


def end_to_end(detector: BaseDetector) -> Union[OneStage, TwoStage]:
    """Make a detector a graph of tensors, to be exported.

    Args:
        detector (BaseDetector): In eval mode.

    Returns:
        OneStage | TwoStage: From images to detections.

    Raises:
        ValueError: If the detector decodes in another way than these do.
    """
    cfg = detector.test_cfg
    if isinstance(detector, SingleStageDetector):
        _check_dense_head(detector.bbox_head, BaseDenseHead, cfg)
        return OneStage(detector)
    _expect(
        isinstance(detector, TwoStageDetector),
        detector,
        'is a one-stage or a two-stage detector',
    )
    _check_dense_head(detector.rpn_head, RPNHead, cfg.rpn)
    _check_roi_head(detector.roi_head, cfg.rcnn)
    return TwoStage(detector)
