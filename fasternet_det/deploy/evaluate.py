"""Score an exported detector as mmdet scores the original."""

from math import ceil
from typing import TYPE_CHECKING, Dict, Iterator, List, Optional

import numpy as np
import torch
from mmdet.models import BaseDetector
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.registry import DATASETS, MODELS
from mmdet.structures import DetDataSample, SampleList
from mmengine.config import Config, ConfigDict
from mmengine.dataset import pseudo_collate
from mmengine.evaluator import Evaluator
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from torch import Size, Tensor
from torch.nn.functional import interpolate

if TYPE_CHECKING:  # which wants the packages of export
    from .export import Session

AS_READ = dict(type='DetDataPreprocessor')  # neither normalises nor pads


class ExportedDetector(BaseDetector):
    """An exported detector that predicts as an mmdet detector does.

    Where the exported graph clips boxes, it does so to its input, which may be
    padded; here they are clipped to the image.

    Args:
        session (Session): See :func:`~fasternet_det.deploy.export.load`.
        data_preprocessor (dict): The original's config; not used by a graph
            that takes images as they are read.
        metadata (dict, optional): See
            :func:`~fasternet_det.deploy.metadata.describe`. Defaults to None:
            normalised images, clipped boxes, and masks within boxes of 0.5
            and more.
    """

    def __init__(
        self,
        session: 'Session',
        data_preprocessor: dict,
        metadata: Optional[dict] = None,
    ) -> None:
        notes = metadata or {}
        self.dtype = notes.get('dtype', 'float32')
        as_read = self.dtype == 'uint8'
        super().__init__(AS_READ if as_read else data_preprocessor)
        self.session = session
        self.clips = notes.get('clip_border', True)
        self.on_image = notes.get('mask_grid') == 'image'
        self.mask_cfg = Config(
            dict(mask_thr_binary=notes.get('mask_threshold') or 0.5)
        )
        self.mask_head = FCNMaskHead(num_convs=0, class_agnostic=True)

    def predict(
        self,
        batch_inputs: Tensor,
        batch_data_samples: SampleList,
        rescale: bool = True,
    ) -> SampleList:
        """Detect; see :meth:`mmdet.models.SingleStageDetector.predict`.

        Args:
            batch_inputs (Tensor): What the preprocessor gives, (N, C, H, W).
            batch_data_samples (list[DetDataSample]): What is known of them.
            rescale (bool): Whether to give boxes of the original images
                instead of the resized ones. Defaults to True.

        Returns:
            list[DetDataSample]: The samples with ``pred_instances``.
        """
        outputs = self.session(batch_inputs.cpu().numpy().astype(self.dtype))
        results = []
        for sample, dets, labels, *masks in zip(
            batch_data_samples, *map(torch.from_numpy, outputs)
        ):
            kept = labels >= 0
            result = InstanceData(
                bboxes=dets[kept, :4],
                scores=dets[kept, 4],
                labels=labels[kept],
            )
            if self.clips:
                limit = dets.new_tensor(sample.img_shape[::-1] * 2)
                result.bboxes = result.bboxes.minimum(limit)
            if masks and not self.on_image:
                # scales the boxes too
                (result,) = self.mask_head.predict_by_feat(
                    (masks[0][kept][:, None],),
                    [result],
                    [sample.metainfo],
                    self.mask_cfg,
                    rescale,
                    activate_map=True,
                )
            elif rescale:
                result.bboxes /= dets.new_tensor(sample.scale_factor * 2)
            if self.on_image:
                result.masks = self._spread(
                    masks[0][kept], batch_inputs.shape[2:], sample, rescale
                )
            results.append(result)
        return self.add_pred_to_datasample(batch_data_samples, results)

    def _spread(
        self, logits: Tensor, size: Size, sample: DetDataSample, rescale: bool
    ) -> Tensor:
        """Masks of logits (n, h, w) over the input, as mmdet's RTMDet-Ins."""
        shape = sample.ori_shape if rescale else size
        if not len(logits):
            return logits.new_zeros((0, *shape), dtype=torch.bool)
        logits = interpolate(logits[None], size, mode='bilinear')
        if rescale:  # rows by the width's factor, as there
            size = [
                ceil(a * (1 / b)) for a, b in zip(size, sample.scale_factor)
            ]
            logits = interpolate(logits, size, mode='bilinear')
        height, width = shape
        logits = logits[0, :, :height, :width]
        return logits.sigmoid() > self.mask_cfg.mask_thr_binary

    def loss(self, *_: object) -> None:
        """Refuse to train."""
        raise NotImplementedError('an exported detector does not train')

    _forward = extract_feat = loss


def evaluate(config: Config, model: BaseDetector) -> Dict[str, float]:
    """Score a detector by a config's test set and evaluator.

    Args:
        config (Config): The detector's config.
        model (BaseDetector): The detector, in eval mode, or an
            :class:`ExportedDetector`.

    Returns:
        dict[str, float]: What ``tools/test.py`` reports, such as
        ``coco/bbox_mAP``, from 0 to 1.
    """
    loader = Runner.build_dataloader(config.test_dataloader)
    evaluator = Evaluator(config.test_evaluator)
    evaluator.dataset_meta = loader.dataset.metainfo
    for batch in loader:
        with torch.no_grad():
            evaluator.process(model.test_step(batch), batch)
    return evaluator.evaluate(len(loader.dataset))


def _pipeline(dataset: ConfigDict) -> List[dict]:
    """The pipeline of a dataset, or of the first in it."""
    if 'dataset' in dataset:
        return _pipeline(dataset.dataset)
    if 'datasets' in dataset:
        return _pipeline(dataset.datasets[0])
    return dataset.pipeline


def _piped(dataset: ConfigDict, pipeline: List[dict]) -> dict:
    """Config of the images of a dataset by another pipeline."""
    if 'dataset' in dataset:  # as in RepeatDataset
        return _piped(dataset.dataset, pipeline)
    if 'datasets' in dataset:  # as in ConcatDataset
        parts = [_piped(part, pipeline) for part in dataset.datasets]
        return dict(dataset, datasets=parts)
    return dict(dataset, pipeline=pipeline)


def calibration_batches(config: Config, count: int) -> Iterator[dict]:
    """Images of a config's training split, prepared as for validation.

    Args:
        config (Config): The detector's config.
        count (int): How many, spread over the split.

    Yields:
        dict: Of one image, what a dataloader gives and a detector's
        ``test_step`` takes.

    Raises:
        ValueError: If the config has no training set.
    """
    if not config.get('train_dataloader'):
        raise ValueError(
            'the config has no train_dataloader to take calibration images '
            'from: add one, or give images of your own to '
            'optimize(model, torch.int8, calibration=...)'
        )
    # that of tests may give each image several times
    loader = config.get('val_dataloader') or config.test_dataloader
    pipeline = _pipeline(loader.dataset)
    dataset = DATASETS.build(_piped(config.train_dataloader.dataset, pipeline))
    for i in np.linspace(0, len(dataset) - 1, count).round().astype(int):
        yield pseudo_collate([dataset[int(i)]])


def calibration_images(
    config: Config, count: int, pixels: bool = False
) -> Iterator[np.ndarray]:
    """The images of :func:`calibration_batches` as arrays.

    Args:
        config (Config): The detector's config.
        count (int): How many, spread over the split.
        pixels (bool): Whether to leave them as they are read and resized.
            Defaults to False.

    Yields:
        ndarray: Images of shape (1, C, H, W), normalised float32 or uint8.
    """
    preprocess = MODELS.build(
        AS_READ if pixels else config.model.data_preprocessor
    )
    dtype = np.uint8 if pixels else np.float32
    for batch in calibration_batches(config, count):
        yield preprocess(batch)['inputs'].numpy().astype(dtype)
