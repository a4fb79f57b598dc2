from .saconv import ConvAWS2d, SAConv
from .spconv import SPConv
from .tshaped import TShapedConv

__all__ = ['ConvAWS2d', 'SAConv', 'SPConv', 'TShapedConv']
