"""Score an exported detector as mmdet scores the original."""

from typing import Dict, Iterator, List

import numpy as np
import torch
from mmdet.models import BaseDetector
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.registry import DATASETS, MODELS
from mmdet.structures import SampleList
from mmengine.config import Config, ConfigDict
from mmengine.dataset import pseudo_collate
from mmengine.evaluator import Evaluator
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from torch import Tensor

from .export import Session


class ExportedDetector(BaseDetector):
    """An exported detector that predicts as an mmdet detector does.

    The exported graph clips boxes to its input, which may be padded; here
    they are clipped to the image.

    Args:
        session (Session): See :func:`~fasternet_det.deploy.export.load`.
        data_preprocessor (dict): The original's config.
        mask_thr_binary (float): Probability from which on a pixel belongs to
            a mask. Defaults to 0.5.
    """

    def __init__(
        self,
        session: Session,
        data_preprocessor: dict,
        mask_thr_binary: float = 0.5,
    ) -> None:
        super().__init__(data_preprocessor)
        self.session = session
        self.mask_cfg = Config(dict(mask_thr_binary=mask_thr_binary))
        self.mask_head = FCNMaskHead(num_convs=0, class_agnostic=True)

    def predict(
        self,
        batch_inputs: Tensor,
        batch_data_samples: SampleList,
        rescale: bool = True,
    ) -> SampleList:
        """Detect; see :meth:`mmdet.models.SingleStageDetector.predict`.

        Args:
            batch_inputs (Tensor): Normalised images of shape (N, 3, H, W).
            batch_data_samples (list[DetDataSample]): What is known of them.
            rescale (bool): Whether to give boxes of the original images
                instead of the resized ones. Defaults to True.

        Returns:
            list[DetDataSample]: The samples with ``pred_instances``.
        """
        outputs = self.session(batch_inputs.cpu().numpy())
        results = []
        for sample, dets, labels, *masks in zip(
            batch_data_samples, *map(torch.from_numpy, outputs)
        ):
            kept = labels >= 0
            height, width = sample.img_shape
            limit = dets.new_tensor([width, height, width, height])
            result = InstanceData(
                bboxes=dets[kept, :4].minimum(limit),
                scores=dets[kept, 4],
                labels=labels[kept],
            )
            if masks:
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
            results.append(result)
        return self.add_pred_to_datasample(batch_data_samples, results)

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


def _piped(dataset: ConfigDict, pipeline: List[dict]) -> dict:
    """Config of the images of a dataset by another pipeline."""
    if 'dataset' in dataset:  # as in RepeatDataset
        return _piped(dataset.dataset, pipeline)
    if 'datasets' in dataset:  # as in ConcatDataset
        parts = [_piped(part, pipeline) for part in dataset.datasets]
        return dict(dataset, datasets=parts)
    return dict(dataset, pipeline=pipeline)


def calibration_images(config: Config, count: int) -> Iterator[np.ndarray]:
    """Images of a config's training split, prepared as its tests do.

    Args:
        config (Config): The detector's config.
        count (int): How many, spread over the split.

    Yields:
        ndarray: Normalised images of shape (1, C, H, W), float32.
    """
    pipeline = config.test_dataloader.dataset.pipeline
    dataset = DATASETS.build(_piped(config.train_dataloader.dataset, pipeline))
    preprocess = MODELS.build(config.model.data_preprocessor)
    for i in np.linspace(0, len(dataset) - 1, count).round().astype(int):
        batch = pseudo_collate([dataset[int(i)]])
        yield preprocess(batch)['inputs'].numpy()
