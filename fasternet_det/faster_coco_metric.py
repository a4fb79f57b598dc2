"""mmdet's CocoMetric, computed by faster-coco-eval."""

import importlib.util
from typing import Any, Dict
from unittest.mock import patch

from mmdet.evaluation import CocoMetric
from mmdet.evaluation.metrics import coco_metric
from mmdet.registry import METRICS


@METRICS.register_module()
class FasterCocoMetric(CocoMetric):
    """mmdet's CocoMetric, whose numbers faster-coco-eval computes, in C++.

    Args:
        *args: The arguments of mmdet's.
        **kwargs: The other arguments of mmdet's.

    Raises:
        ImportError: If there is no faster-coco-eval.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if importlib.util.find_spec('faster_coco_eval') is None:
            raise ImportError(
                'FasterCocoMetric needs faster-coco-eval: run '
                'pip install --no-deps faster-coco-eval==1.8.0, '
                'or take CocoMetric, which finds the same numbers'
            )
        super().__init__(*args, **kwargs)

    def compute_metrics(self, results: list) -> Dict[str, float]:
        """Compute the metrics, as mmdet's does."""
        from faster_coco_eval.core.faster_eval_api import COCOeval

        class Evaluation(COCOeval):
            def summarize(self) -> None:
                super().summarize()
                # pycocotools', and so mmdet's, whatever proposal_nums are
                counted = 100 in self.params.maxDets
                self.stats[0] = (
                    self._summarize(1, maxDets=100) if counted else -1
                )

        # mmdet's leaves no place for another class.
        with patch.object(coco_metric, 'COCOeval', Evaluation):
            return super().compute_metrics(results)
