from .fold import fold
from .hook import OptimizeHook
from .optimize import optimize
from .versions import check_torch

__all__ = ['OptimizeHook', 'check_torch', 'fold', 'optimize']
