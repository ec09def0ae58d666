"""Data modules of the recipes; they know nothing of pruning."""

from lightning_prune.data.cifar10 import CIFAR10DataModule
from lightning_prune.data.coco import COCODetection
from lightning_prune.data.digits import DigitsDataModule
from lightning_prune.data.scene_files import write_voc
from lightning_prune.data.scene_modules import ScenesDetection, ScenesSegmentation
from lightning_prune.data.scenes import Scene, Scenes
from lightning_prune.data.voc import VOCDetection, VOCSegmentation

__all__ = [
    "CIFAR10DataModule",
    "COCODetection",
    "DigitsDataModule",
    "Scene",
    "Scenes",
    "ScenesDetection",
    "ScenesSegmentation",
    "VOCDetection",
    "VOCSegmentation",
    "write_voc",
]
