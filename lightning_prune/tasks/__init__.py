"""LightningModules that train a network for a task. They know nothing of pruning."""

from lightning_prune.tasks.classification import ClassificationTask, RocCurves
from lightning_prune.tasks.detection import DetectionTask
from lightning_prune.tasks.detectors import Detector, MultiScale, TorchvisionDetector, YoloDetector
from lightning_prune.tasks.segmentation import SegmentationTask
from lightning_prune.tasks.voc_map import VocMeanAveragePrecision

__all__ = [
    "ClassificationTask",
    "DetectionTask",
    "Detector",
    "MultiScale",
    "RocCurves",
    "SegmentationTask",
    "TorchvisionDetector",
    "VocMeanAveragePrecision",
    "YoloDetector",
]
