from .fasternet import FasterNet
from .g_ghost_regnet import GGhostRegNet

__all__ = ['FasterNet', 'GGhostRegNet']
