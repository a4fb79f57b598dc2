from .saconv import ConvAWS2d, SAConv
from .spconv import SPConv

__all__ = ['ConvAWS2d', 'SAConv', 'SPConv']
