"""Data modules of the recipes.

Here: reading, checking, rendering and transforming images and what is known of them, up to batches. Not here: what is
learnt from them (`tasks`), and pruning, of which they know nothing.
"""

from lightning_prune.data.cifar10 import CIFAR10DataModule
from lightning_prune.data.coco import COCODetection
from lightning_prune.data.digits import DigitsDataModule
from lightning_prune.data.folder_segmentation import FolderSegmentation
from lightning_prune.data.idx import IDXDataModule
from lightning_prune.data.image_folder import ImageFolderDataModule
from lightning_prune.data.scenes import Scene, Scenes
from lightning_prune.data.scenes_data import ScenesDetection, ScenesSegmentation
from lightning_prune.data.voc import VOCDetection, VOCSegmentation
from lightning_prune.data.voc_files import write_voc
from lightning_prune.data.yolo_format import YOLODetection

__all__ = [
    "CIFAR10DataModule",
    "COCODetection",
    "DigitsDataModule",
    "FolderSegmentation",
    "IDXDataModule",
    "ImageFolderDataModule",
    "Scene",
    "Scenes",
    "ScenesDetection",
    "ScenesSegmentation",
    "VOCDetection",
    "VOCSegmentation",
    "YOLODetection",
    "write_voc",
]
