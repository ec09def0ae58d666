"""Data modules of the recipes; they know nothing of pruning."""

from lightning_prune.data.cifar10 import CIFAR10DataModule
from lightning_prune.data.digits import DigitsDataModule
from lightning_prune.data.scene_modules import ScenesDetection, ScenesSegmentation

__all__ = [
    "CIFAR10DataModule",
    "DigitsDataModule",
    "ScenesDetection",
    "ScenesSegmentation",
]
