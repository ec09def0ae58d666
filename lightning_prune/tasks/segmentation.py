"""Semantic segmentation: cross-entropy with ignored pixels and an auxiliary head, global accuracy and mean IoU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from lightning_prune.tasks.deployed import DeployedSegmentation
from lightning_prune.tasks.drawing import draw_classes
from lightning_prune.tasks.task import Schedule, Task

Batch = tuple[Tensor, Tensor]


class SegmentationTask(Task):
    r"""Train any segmentation network on (images, masks) batches.

    Logs `train_loss`; `val_loss`, `val_acc` (global pixel accuracy) and `val_miou`; the same for the test set, and
    there the IoU of every class as `test_iou_class_0`, `test_iou_class_1`... (NaN for a class that is neither in the
    masks nor predicted, which the mean leaves out). With :math:`n_{ij}` pixels of class i predicted as j and
    :math:`t_i = \sum_j n_{ij}` (Lee et al., Sensors 23(4):2102, eqs. 2 and 3):

    .. math:: acc = \sum_i n_{ii} / \sum_i t_i, \qquad
        mIoU = \frac{1}{C} \sum_i n_{ii} / (t_i + \sum_j n_{ji} - n_{ii})

    Shapes: images (N, C, H, W), masks (N, H, W) int64, logits (N, num_classes, H, W).

    To prune the backbone alone, as Lee et al. do, let the selection ignore the heads:
    ``PruneCallback(selection=LayerRatio(0.3, ignore=["*classifier.*"]))``, or the recipe prune/backbone_only.yaml.

    Args:
        model: Maps images to logits, or to a dict with the logits under "out" and, where it has an auxiliary head,
            under "aux", as torchvision's FCN, DeepLabV3 and LR-ASPP do.
        num_classes: Number of classes, background included; must be the width of the logits.
        ignore_index: Mask value of pixels that count neither in the loss nor in the metrics.
        aux_weight: Weight of the auxiliary head's loss (torchvision's reference: 0.5).
        background: Class that `draw_predictions` leaves uncoloured; None where every class is something to see.
        optimizer: Builds the optimizer from the parameters.
        lr_scheduler: "poly", "cosine", "constant", or what builds a scheduler from the optimizer; see `Task`.
        input_size: One image as (C, H, W), for `example_input_array`.

    Raises:
        ValueError: For num_classes below 2, a negative aux_weight, an ignore_index that is a class, or an output that
            is not as above.

    Example:
        >>> task = SegmentationTask(nn.Conv2d(3, 5, 3, padding=1), num_classes=5, input_size=(3, 16, 16))
        >>> task(task.example_input_array).shape
        torch.Size([2, 5, 16, 16])
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        *,
        ignore_index: int = 255,
        aux_weight: float = 0.5,
        background: int | None = 0,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, weight_decay=1e-4),
        lr_scheduler: Schedule = "poly",
        input_size: Sequence[int] = (3, 480, 480),
    ) -> None:
        super().__init__(model, num_classes, optimizer, lr_scheduler, input_size)
        if 0 <= ignore_index < num_classes:
            raise ValueError(f"ignore_index must be no class 0..{num_classes - 1}, got {ignore_index}.")
        if aux_weight < 0:
            raise ValueError(f"aux_weight must not be negative, got {aux_weight}.")
        self.ignore_index = ignore_index
        self.aux_weight = aux_weight
        self.background = background
        metrics = MetricCollection(
            {
                "acc": MulticlassAccuracy(num_classes, average="micro", ignore_index=ignore_index),
                "miou": MulticlassJaccardIndex(num_classes, ignore_index=ignore_index),
            },
            compute_groups=False,
        )
        self.metrics: Any = nn.ModuleDict({stage: metrics.clone(f"{stage}_") for stage in ("val", "test")})

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy over the pixels of one batch that are not ignored, the auxiliary head's added."""
        images, masks = batch
        out, aux = self._logits(images, masks)
        loss = self._cross_entropy(out, masks)
        return {"loss": loss if aux is None else loss + self.aux_weight * self._cross_entropy(aux, masks)}

    def evaluate(self, batch: Batch, batch_idx: int, stage: str) -> None:
        images, masks = batch
        logits = self._logits(images, masks)[0]
        self.metrics[stage].update(logits.argmax(dim=1), masks)
        shown: dict[str, Any] = {"prog_bar": True, "batch_size": len(masks)}
        self.log(f"{stage}_loss", self._cross_entropy(logits, masks), sync_dist=True, **shown)
        self.log_dict(self.metrics[stage], **shown)

    def on_test_epoch_end(self) -> None:
        miou = self.metrics["test"]["miou"]
        with miou.sync_context():
            hit, both = miou.confmat.diagonal().double(), miou.confmat.sum(0) + miou.confmat.sum(1)
        self.log_classes("test_iou", (hit / (both - hit)).float())  # NaN for a class that occurs nowhere

    def predict_step(self, batch: Batch | Tensor, batch_idx: int) -> Tensor:
        """Classes (N, H, W) of a batch, with or without masks."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        return self._logits(images)[0].argmax(dim=1)

    def deployed(self) -> nn.Module:
        """What is exported: the network without its auxiliary head; logits under ``out``."""
        return DeployedSegmentation(self.model)

    def draw_predictions(self, batch: Batch, predictions: Tensor | None = None) -> list[Tensor]:
        """The images of a batch under the classes found, or the true ones; (3, H, W) uint8, small ones enlarged."""
        images, masks = batch
        shown = zip(images, masks if predictions is None else predictions, strict=True)
        clear = (self.background, self.ignore_index)
        return [draw_classes(image, classes, clear) for image, classes in shown]

    def _logits(self, images: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        output = self(images)
        heads = output if isinstance(output, Mapping) else {"out": output}
        shape = (len(images), self.num_classes, *(images if masks is None else masks).shape[-2:])
        for name in ("out", "aux"):
            logits = heads.get(name)
            if name == "aux" and logits is None:
                continue
            if not isinstance(logits, Tensor) or logits.shape != shape:
                got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise ValueError(
                    f"{type(self.model).__name__} must return logits of shape {shape}, or a dict with them under "
                    f"'out' and perhaps 'aux', got {got} for {name!r}. Give the model and the task the same "
                    "num_classes, and let the model resize its output to the image."
                )
        return heads["out"], heads.get("aux")

    def _cross_entropy(self, logits: Tensor, masks: Tensor) -> Tensor:
        logits = logits if logits.dtype == torch.float64 else logits.float()  # a sum over a million pixels
        total = F.cross_entropy(logits, masks, ignore_index=self.ignore_index, reduction="sum")
        return total / (masks != self.ignore_index).sum().clamp(min=1)  # a batch may hold no pixel that counts
