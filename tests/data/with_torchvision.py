"""Run a script where torchvision can be imported.

    python with_torchvision.py SCRIPT [ARGUMENT...]

PyPI's is for CUDA, whose operators do not load beside torch for CPUs: declared,
it imports there, and what needs none of its operators runs.
"""

import runpy
import sys

import torch

library = torch.library.Library('torchvision', 'DEF')
for name in ('nms', 'qnms'):
    library.define(
        f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor'
    )

if __name__ == '__main__':
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name='__main__')
