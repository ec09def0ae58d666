"""Object detection: YOLOv3, torchvision's detectors, or a network of one's own; mean average precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.cli import OptimizerCallable
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.detection import MeanAveragePrecision

from lightning_prune.tasks.detectors import Detections, Detector, Images, Target, detector_for
from lightning_prune.tasks.drawing import draw, image_loggers, log_images
from lightning_prune.tasks.optimization import Schedule, optimizer_and_schedule
from lightning_prune.tasks.voc_map import VocMeanAveragePrecision

Batch = tuple[Images, Sequence[Target]]

COCO_NAMES = ("map", "map_50", "map_75", "mar_100")
LOW_SCORE, HIGH_SCORE = 0.01, 0.2  # Lee et al. tested at the first and trained at the second


class DetectionTask(LightningModule):
    """Train any detector on (images, targets) batches.

    Logs `train_loss` and its parts (`train_loss_box`, ...); `val_map`, `val_map_50`, `val_map_75` and `val_mar_100` as
    COCO defines them, by pycocotools; `val_map_voc07` (11 points) and `val_map_voc10` (all points), at overlap 0.5 and
    scores of at least 0.01; the same for the test set, and there besides `test_map_voc07_conf20` and
    `test_map_voc10_conf20` for scores of at least 0.2, and `test_map_class_0`, `test_map_class_1`... A few images of
    every validation are drawn with the boxes found, if the logger takes images (TensorBoard, Weights & Biases).

    A batch is (images, targets). Images: a list of (C, H, W) or a tensor (N, C, H, W), in [0, 1]. Targets: one dict per
    image with ``boxes`` (n, 4), xyxy in pixels, and ``labels`` (n,) int64 in 0..num_classes-1 without background; and,
    if there are any, ``difficult`` and ``iscrowd`` (n,), which are not trained on and are evaluated by VOC's and COCO's
    rules, and ``area`` (n,). Boxes come back in the pixels of the images that went in.

    Args:
        model: `YoloV3`, `YoloV3Tiny`, one of torchvision's detectors, or any network with a `Detector` of its own.
        num_classes: without background.
        detector: how to get losses and boxes from the network; None: known from its type.
        class_names: for drawings.
        drawn_images: of each validation and test.
        optimizer: builds the optimizer from the parameters.
        lr_scheduler: builds a scheduler, stepped once an epoch, from the optimizer. "cosine" falls to zero over the
            Trainer's max_epochs, "poly" as a power of the steps left, "constant" leaves the learning rate as it is.
        burn_in: steps over which the learning rate rises, as (step / burn_in) ** 4 (darknet: 1000).
        val_loss: log `val_loss` and `test_loss` too, for the price of a second forward pass.
        input_size: one image as (C, H, W), for `example_input_array`.

    Raises:
        ValueError: num_classes below 1 or not the network's, an unknown type of network, or a batch in another form.

    Example:
        >>> from lightning_prune.models import YoloV3Tiny
        >>> from lightning_prune.tasks import YoloDetector
        >>> task = DetectionTask(YoloV3Tiny(3, width=0.25), 3, detector=YoloDetector(64), input_size=(3, 64, 64))
        >>> [tuple(head.shape) for head in task(task.example_input_array)]
        [(2, 24, 2, 2), (2, 24, 4, 4)]
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        *,
        detector: Detector | None = None,
        class_names: Sequence[str] = (),
        drawn_images: int = 4,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, weight_decay=5e-4),
        lr_scheduler: Schedule = "cosine",
        burn_in: int = 0,
        val_loss: bool = False,
        input_size: Sequence[int] = (3, 416, 416),
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}.")
        if burn_in < 0 or drawn_images < 0:
            raise ValueError(f"burn_in and drawn_images must be at least 0, got {burn_in} and {drawn_images}.")
        if class_names and len(class_names) != num_classes:
            raise ValueError(f"class_names must hold {num_classes} names, got {len(class_names)}.")
        self.model = model
        self.num_classes = num_classes
        self.detector = detector if detector is not None else detector_for(model)
        self.detector.check(model, num_classes)
        self.class_names = tuple(class_names) or tuple(str(label) for label in range(num_classes))
        self.drawn_images = drawn_images
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.burn_in = burn_in
        self.val_loss = val_loss
        images = torch.rand(2, *input_size, generator=torch.Generator().manual_seed(0))
        self.example_input_array = self.detector.example(images)

        # torchmetrics keeps its states out of state_dict.
        self.val_coco = MeanAveragePrecision(backend="pycocotools")
        self.test_coco = MeanAveragePrecision(backend="pycocotools", class_metrics=True)
        for metric in (self.val_coco, self.test_coco):
            metric.warn_on_many_detections = False  # COCO counts the best hundred, as is its rule
        self.val_voc = VocMeanAveragePrecision(num_classes, min_score=LOW_SCORE)
        self.test_voc = VocMeanAveragePrecision(num_classes, min_score=LOW_SCORE)
        self.test_voc_high = VocMeanAveragePrecision(num_classes, min_score=HIGH_SCORE)

    def forward(self, images: Any) -> Any:
        """What the network itself returns: raw head maps of a tensor, or boxes of a list of images in eval mode."""
        return self.model(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Sum of the detector's losses on one batch; crowds and difficult objects are left out."""
        images, targets = self._checked(batch)
        losses = self.detector.losses(self.model, images, [_plain(target) for target in targets], self.global_step)
        loss = torch.stack(list(losses.values())).sum()
        self.log(
            "train_loss", loss, on_step=False, on_epoch=True, sync_dist=True, prog_bar=True, batch_size=len(images)
        )
        for name, part in losses.items():
            self.log(_part_name(name), part, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one batch to the validation metrics."""
        self._evaluate(batch, batch_idx, "val", self.val_coco, self.val_voc)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one batch to the test metrics."""
        self._evaluate(batch, batch_idx, "test", self.test_coco, self.test_voc, self.test_voc_high)

    def predict_step(self, batch: Batch | Images, batch_idx: int) -> list[Detections]:
        """``boxes`` (xyxy in the image's own pixels), ``scores`` and ``labels`` of every image of a batch."""
        labelled = isinstance(batch, tuple | list) and len(batch) == 2 and not isinstance(batch[1], Tensor)
        return self.detector.detect(self.model, batch[0] if labelled else batch)  # type: ignore[arg-type]

    def draw_predictions(self, batch: Batch, predictions: list[Detections] | None = None) -> list[Tensor]:
        """The images of a batch with the boxes found, or with the true ones; (3, H, W) uint8, small ones enlarged."""
        images, targets = batch
        shown = zip(images, targets if predictions is None else predictions, strict=True)
        return [draw(image, found, self.class_names) for image, found in shown]

    def on_validation_epoch_end(self) -> None:
        """Log the validation's mean average precisions."""
        self._close("val", self.val_coco, self.val_voc)

    def on_test_epoch_end(self) -> None:
        """Log the test's mean average precisions, also of every class and at a high score."""
        results = self._close("test", self.test_coco, self.test_voc)
        self._log_same({f"test_map_{name}_conf20": value for name, value in self.test_voc_high.compute().items()})
        self.test_voc_high.reset()
        per_class = torch.full((self.num_classes,), torch.nan)
        per_class[results["classes"].view(-1).long().cpu()] = _defined(results["map_per_class"]).view(-1).cpu()
        self._log_same({f"test_map_class_{label}": value for label, value in enumerate(per_class)})

    def configure_optimizers(self) -> Any:
        """Build the optimizer and its schedule in the form that Lightning expects."""
        return optimizer_and_schedule(self, self.optimizer, self.lr_scheduler)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """One step, with a smaller learning rate during burn-in; what schedulers see stays theirs."""
        share = min(1.0, ((self.global_step + 1) / self.burn_in) ** 4) if self.burn_in else 1.0
        before = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * share
        try:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        finally:
            for group, rate in zip(optimizer.param_groups, before, strict=True):
                group["lr"] = rate

    def _evaluate(self, batch: Batch, batch_idx: int, stage: str, coco: MeanAveragePrecision, *voc: Metric) -> None:
        images, targets = self._checked(batch)
        found = [_in_full(detections) for detections in self.detector.detect(self.model, images)]
        coco.update(found, [_known_to_coco(target) for target in targets])
        for metric in voc:
            metric.update(found, targets)
        if self.val_loss:
            plain = [_plain(target) for target in targets]
            with isolate_rng():  # Faster R-CNN samples its proposals: alike every time, and training goes on as without
                torch.manual_seed(batch_idx)
                losses = self.detector.losses(self.model, images, plain, self.global_step)
            loss = torch.stack(list(losses.values())).sum()
            self.log(f"{stage}_loss", loss, batch_size=len(images), sync_dist=True)
        if batch_idx == 0 and not self.trainer.sanity_checking and image_loggers(self.loggers):
            some = slice(self.drawn_images)
            drawn = self.draw_predictions((images[some], targets[some]), found[some])
            log_images(self.loggers, f"{stage}_detections", drawn, self.global_step)

    def _close(self, stage: str, coco: MeanAveragePrecision, voc: VocMeanAveragePrecision) -> dict[str, Tensor]:
        results: dict[str, Tensor] = coco.compute()
        logged = {f"{stage}_{name}": _defined(results[name]) for name in COCO_NAMES}
        self._log_same(logged | {f"{stage}_map_{name}": value for name, value in voc.compute().items()})
        coco.reset()
        voc.reset()
        return results

    def _log_same(self, values: dict[str, Tensor]) -> None:
        """Log what is over all processes already; saying so keeps Lightning from advising otherwise."""
        self.log_dict({name: float(value) for name, value in values.items()}, sync_dist=True)

    def _checked(self, batch: Batch) -> Batch:
        images, targets = batch
        if len(images) != len(targets):
            raise ValueError(f"a batch holds {len(images)} images and {len(targets)} targets.")
        for place, target in enumerate(targets):
            boxes, labels = target["boxes"], target["labels"]
            if boxes.shape != (len(labels), 4):
                raise ValueError(
                    f"image {place} of a batch has boxes of shape {tuple(boxes.shape)} and {len(labels)} labels; "
                    "boxes are (n, 4) and labels (n,)."
                )
            if boxes.dtype in (torch.float16, torch.bfloat16):
                raise ValueError(
                    f"image {place} of a batch has boxes of {boxes.dtype}, which rounds pixels; let the Trainer have "
                    'precision="bf16-mixed" or "16-mixed", which leaves boxes as they are.'
                )
            if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
                raise ValueError(
                    f"image {place} of a batch has labels from {int(labels.min())} to {int(labels.max())}; they must "
                    f"lie in 0..{self.num_classes - 1}, without background, which the task adds where a network has it."
                )
            if not (boxes[:, 2:] > boxes[:, :2]).all():
                raise ValueError(f"image {place} of a batch has a box without area: {boxes.tolist()}.")
        return batch


def _plain(target: Target) -> Target:
    """The objects to train on: neither a crowd nor difficult."""
    keep = torch.ones_like(target["labels"], dtype=torch.bool)
    for flag in ("iscrowd", "difficult"):
        if flag in target:
            keep &= ~target[flag].bool()
    return {"boxes": target["boxes"][keep].float(), "labels": target["labels"][keep].long()}


def _in_full(found: Detections) -> Detections:
    return {name: value.float() if value.is_floating_point() else value for name, value in found.items()}


def _known_to_coco(target: Target) -> Target:
    known = {"boxes": target["boxes"].float(), "labels": target["labels"]}
    if "iscrowd" in target:
        known["iscrowd"] = target["iscrowd"].long()
    if "area" in target:
        known["area"] = target["area"]
    return known


def _defined(value: Tensor) -> Tensor:
    """NaN for -1, with which pycocotools says that there was nothing to find."""
    return value.float().where(value >= 0, torch.nan)


def _part_name(name: str) -> str:
    """`train_loss_box`; torchvision's own names begin with "loss_" already."""
    return f"train_{name if name.startswith('loss_') else f'loss_{name}'}"
