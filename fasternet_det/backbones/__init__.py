from .fasternet import FasterNet
from .g_ghost_regnet import GGhostRegNet
from .ghostnet import GhostNet
from .resnet import SlotResNet

__all__ = ['FasterNet', 'GGhostRegNet', 'GhostNet', 'SlotResNet']
