"""LightningModules that train a network for a task. They know nothing of pruning."""

from lightning_prune.tasks.classification import ClassificationTask, RocCurves

__all__ = ["ClassificationTask", "RocCurves"]
