from .fold import fold
from .optimize import optimize

__all__ = ['fold', 'optimize']
