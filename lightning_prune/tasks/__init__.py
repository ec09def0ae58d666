"""LightningModules that train a network for a task.

Here: classification, segmentation and detection with their losses and metrics, how a detector is talked to, and
pictures of what is found. Not here: networks (`models`), data (`data`), and pruning, of which they know nothing.
"""

from lightning_prune.tasks.classification import ClassificationTask, RocCurves
from lightning_prune.tasks.detection import DetectionTask
from lightning_prune.tasks.detectors import Detector, MultiScale, TorchvisionDetector, YoloDetector
from lightning_prune.tasks.segmentation import SegmentationTask
from lightning_prune.tasks.task import Task
from lightning_prune.tasks.voc_map import VocMeanAveragePrecision

__all__ = [
    "ClassificationTask",
    "DetectionTask",
    "Detector",
    "MultiScale",
    "RocCurves",
    "SegmentationTask",
    "Task",
    "TorchvisionDetector",
    "VocMeanAveragePrecision",
    "YoloDetector",
]
