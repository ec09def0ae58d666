"""Image classification: cross-entropy, accuracy, and one-vs-rest ROC curves."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassROC

from lightning_prune.tasks.task import Schedule, Task

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class RocCurves:
    """One-vs-rest ROC curves, one per class, with the area under each.

    Attributes:
        fpr: False positive rate of each class, (points,) rising from 0 to 1.
        tpr: True positive rate of each class, (points,) rising from 0 to 1.
        thresholds: Falling probability thresholds of each class, (points,).
        auc: Area under each curve, (classes,). NaN for a class that the data holds none of, or nothing but.
        macro_auc: Mean of the areas that are not NaN.
    """

    fpr: tuple[Tensor, ...]
    tpr: tuple[Tensor, ...]
    thresholds: tuple[Tensor, ...]
    auc: Tensor
    macro_auc: float


class ClassificationTask(Task):
    """Train any classifier on (images, labels) batches.

    Logs `train_loss`; `val_loss`, `val_acc` (micro top-1) and `val_auc` (macro, one class against the rest);
    the same for the test set, and there the area of every class as `test_auc_class_0`, `test_auc_class_1`...
    The curves of the last test run are kept in `test_roc`, those of the last validation in `val_roc`.

    Shapes: images (N, C, H, W), labels (N,) int64, logits (N, num_classes).

    Args:
        model: Maps images to logits.
        num_classes: Number of classes; must be the width of the model's logits.
        label_smoothing: Share of the target spread evenly over all classes; for training only, so that
            `val_loss` compares between settings.
        optimizer: Builds the optimizer from the parameters.
        lr_scheduler: "cosine", "poly", "constant", or what builds a scheduler from the optimizer; see `Task`.
        input_size: One image as (C, H, W), for `example_input_array`.

    Raises:
        ValueError: For num_classes below 2, label_smoothing outside [0, 1), or logits of another shape than
            (N, num_classes).

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))
        >>> task = ClassificationTask(net, num_classes=10, input_size=(3, 8, 8))
        >>> task(task.example_input_array).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        *,
        label_smoothing: float = 0.0,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-4),
        lr_scheduler: Schedule = "cosine",
        input_size: Sequence[int] = (3, 32, 32),
    ) -> None:
        super().__init__(model, num_classes, optimizer, lr_scheduler, input_size)
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {label_smoothing}.")
        self.label_smoothing = label_smoothing
        # torchmetrics keeps its states out of state_dict and empties them at the end of an epoch.
        stages = ("val", "test")
        self.accuracy: Any = nn.ModuleDict({of: MulticlassAccuracy(num_classes, average="micro") for of in stages})
        self.curve: Any = nn.ModuleDict({of: MulticlassROC(num_classes) for of in stages})
        self.val_roc: RocCurves | None = None
        self.test_roc: RocCurves | None = None

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy of one batch, averaged over its images."""
        images, labels = batch
        return {"loss": F.cross_entropy(self._logits(images), labels, label_smoothing=self.label_smoothing)}

    def predict_step(self, batch: Batch | Tensor, batch_idx: int) -> Tensor:
        """Class probabilities (N, num_classes) of a batch, with or without labels."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        return self._logits(images).softmax(dim=-1)

    def evaluate(self, batch: Batch, batch_idx: int, stage: str) -> None:
        images, labels = batch
        logits = self._logits(images).float()  # half precision would tie most probabilities
        self.accuracy[stage].update(logits, labels)
        self.curve[stage].update(logits.softmax(dim=-1), labels)
        loss = F.cross_entropy(logits, labels)
        self.log(f"{stage}_loss", loss, prog_bar=stage == "val", batch_size=len(labels), sync_dist=True)
        self.log(f"{stage}_acc", self.accuracy[stage], prog_bar=True, batch_size=len(labels))

    def on_validation_epoch_end(self) -> None:
        self.val_roc = self._close_curve("val")

    def on_test_epoch_end(self) -> None:
        self.test_roc = self._close_curve("test")
        self.log_classes("test_auc", self.test_roc.auc)

    def _logits(self, images: Tensor) -> Tensor:
        logits = self(images)
        if not isinstance(logits, Tensor) or logits.shape != (len(images), self.num_classes):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"{type(self.model).__name__} must return logits of shape {(len(images), self.num_classes)}, "
                f"got {got}. Give the model and the task the same num_classes."
            )
        return logits

    def _close_curve(self, stage: str) -> RocCurves:
        with warnings.catch_warnings():
            # A class that is absent (the sanity check sees two batches) has an undefined area: NaN below.
            warnings.filterwarnings("ignore", message="No (positive|negative) samples in targets")
            fpr, tpr, thresholds = (tuple(x.cpu() for x in rows) for rows in self.curve[stage].compute())
        self.curve[stage].reset()
        areas = torch.stack([torch.trapezoid(t, f) for f, t in zip(fpr, tpr, strict=True)])
        defined = torch.stack([f[-1] * t[-1] > 0 for f, t in zip(fpr, tpr, strict=True)])
        areas = areas.where(defined, torch.nan)
        curves = RocCurves(fpr, tpr, thresholds, areas, areas.nanmean().item())
        self.log_same({f"{stage}_auc": curves.macro_auc})
        return curves
