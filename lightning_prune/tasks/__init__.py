"""LightningModules that train a network for a task. They know nothing of pruning."""

from lightning_prune.tasks.classification import ClassificationTask, RocCurves
from lightning_prune.tasks.segmentation import SegmentationTask

__all__ = ["ClassificationTask", "RocCurves", "SegmentationTask"]
