from .fold import fold

__all__ = ['fold']
