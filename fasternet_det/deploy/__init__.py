from .fold import fold
from .hook import OptimizeHook
from .optimize import optimize

__all__ = ['OptimizeHook', 'fold', 'optimize']
