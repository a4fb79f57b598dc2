"""Inference: a model goes in at the top and comes out at the bottom.

=============  ==============================================================
fold           norms into convolutions, exactly; what is unknown stays
fuse           each module -> what computes it in fewer steps (operators.py,
               blocks.py, 3x3 convolutions by winograd.py, into memory.py's)
precision      the dtype and memory format in which each part computes
decode         maps -> detections, in tensors
int8           layers -> what computes in 8 bits, on scales found by trial
optimize       these in a row: the fast form; in a test loop, hook.py
export         folded and decoded -> ONNX, OpenVINO, INT8; scored by evaluate
=============  ==============================================================
"""

from .fold import fold
from .hook import OptimizeHook
from .optimize import optimize
from .versions import check_torch

__all__ = ['OptimizeHook', 'check_torch', 'fold', 'optimize']
