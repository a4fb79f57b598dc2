"""FasterNet and its relatives as backbones for MMDetection 3.x."""

import importlib.util

__version__ = '0.2.0.dev0'

# Named one by one: a look inside a missing package would raise by itself.
_missing = [
    name
    for name in ('torch', 'mmengine', 'mmcv', 'mmdet', 'pycocotools')
    if importlib.util.find_spec(name) is None
]
if _missing or importlib.util.find_spec('mmcv._ext') is None:
    raise ImportError(
        f'fasternet_det needs {", ".join(_missing) or "the ops of mmcv"}, '
        'which this environment lacks. With torch installed, run\n'
        "    pip install ninja psutil wheel 'setuptools<80'\n"
        "    pip install --no-build-isolation 'mmcv==2.1.0'\n"
        "    pip install 'fasternet_det[mmdet]'\n"
        'In a clone, `python tools/install_mmcv.py` does the second in two '
        'minutes, for torch 2.14 and later too.'
    )

from .backbones import (  # noqa: E402
    FasterNet,
    GGhostRegNet,
    GhostNet,
    SlotResNet,
)
from .check_finite_hook import CheckFiniteHook  # noqa: E402
from .data_preprocessor import MultiChannelDataPreprocessor  # noqa: E402
from .datasets.checked import (  # noqa: E402
    CheckedCocoDataset,
    LoadCheckedImageFromFile,
)
from .distributed import serve_cpus  # noqa: E402
from .exact_checkpoint_hook import ExactCheckpointHook  # noqa: E402
from .faster_coco_metric import FasterCocoMetric  # noqa: E402
from .layers import (  # noqa: E402
    ConvAWS2d,
    SAConv,
    SPConv,
    TShapedConv,
)
from .optim import LayerDecayOptimWrapperConstructor  # noqa: E402
from .rpn_head import SlotRPNHead  # noqa: E402
from .unpickler import guard_mmengine  # noqa: E402

guard_mmengine()
serve_cpus()

__all__ = [
    'CheckFiniteHook',
    'CheckedCocoDataset',
    'ConvAWS2d',
    'ExactCheckpointHook',
    'FasterCocoMetric',
    'FasterNet',
    'GGhostRegNet',
    'GhostNet',
    'LayerDecayOptimWrapperConstructor',
    'LoadCheckedImageFromFile',
    'MultiChannelDataPreprocessor',
    'SAConv',
    'SPConv',
    'SlotRPNHead',
    'SlotResNet',
    'TShapedConv',
]
