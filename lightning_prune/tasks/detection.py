"""Object detection: YOLOv3, torchvision's detectors, or a network of one's own; mean average precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pytorch_lightning.cli import OptimizerCallable
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision

from lightning_prune.tasks.detectors import Detections, Detector, Images, Target, detector_for
from lightning_prune.tasks.drawing import draw, image_loggers, log_images
from lightning_prune.tasks.task import Schedule, Task
from lightning_prune.tasks.voc_map import VocMeanAveragePrecision

Batch = tuple[Images, Sequence[Target]]

COCO_NAMES = ("map", "map_50", "map_75", "mar_100")
COCO_TRUTH = {"boxes": torch.float32, "labels": torch.int64, "iscrowd": torch.int64, "area": torch.float32}
MIN_SCORES = {"": 0.01, "_conf20": 0.2}  # Lee et al. tested at the first and trained at the second


class DetectionTask(Task):
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
        lr_scheduler: "cosine", "poly", "constant", or what builds a scheduler from the optimizer; see `Task`.
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

    fewest_classes = 1

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
        super().__init__(model, num_classes, optimizer, lr_scheduler, input_size)
        if burn_in < 0 or drawn_images < 0:
            raise ValueError(f"burn_in and drawn_images must be at least 0, got {burn_in} and {drawn_images}.")
        if class_names and len(class_names) != num_classes:
            raise ValueError(f"class_names must hold {num_classes} names, got {len(class_names)}.")
        self.detector = detector if detector is not None else detector_for(model)
        self.detector.check(model, num_classes)
        self.class_names = tuple(class_names) or tuple(str(label) for label in range(num_classes))
        self.drawn_images = drawn_images
        self.burn_in = burn_in
        self.val_loss = val_loss
        self.example_input_array = self.detector.example(self.example_input_array)
        # torchmetrics keeps its states out of state_dict.
        self.coco: Any = nn.ModuleDict()
        self.voc: Any = nn.ModuleDict()
        for stage in ("val", "test"):
            coco = MeanAveragePrecision(backend="pycocotools", class_metrics=stage == "test")
            coco.warn_on_many_detections = False  # COCO counts the best hundred, as is its rule
            self.coco[stage] = coco
            lowest = MIN_SCORES.values() if stage == "test" else (MIN_SCORES[""],)
            self.voc[stage] = nn.ModuleList(VocMeanAveragePrecision(num_classes, min_score=low) for low in lowest)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The detector's losses on one batch and their sum; crowds and difficult objects are left out."""
        images, targets = self._checked(batch)
        parts = self.detector.losses(self.model, images, [_plain(target) for target in targets], self.global_step)
        # torchvision's own names begin with "loss_" already
        named = {name if name.startswith("loss_") else f"loss_{name}": part for name, part in parts.items()}
        return {"loss": torch.stack(list(parts.values())).sum(), **named}

    def predict_step(self, batch: Batch | Images, batch_idx: int) -> list[Detections]:
        """``boxes`` (xyxy in the image's own pixels), ``scores`` and ``labels`` of every image of a batch."""
        labelled = isinstance(batch, tuple | list) and len(batch) == 2 and not isinstance(batch[1], Tensor)
        return self.detector.detect(self.model, batch[0] if labelled else batch)  # type: ignore[arg-type]

    def deployed(self, nms: bool = False) -> nn.Module:
        """What is exported: a network that returns boxes, see `Detector.deployed`."""
        return self.detector.deployed(self.model, nms=nms)

    def draw_predictions(self, batch: Batch, predictions: list[Detections] | None = None) -> list[Tensor]:
        """The images of a batch with the boxes found, or with the true ones; (3, H, W) uint8, small ones enlarged."""
        images, targets = batch
        shown = zip(images, targets if predictions is None else predictions, strict=True)
        return [draw(image, found, self.class_names) for image, found in shown]

    def evaluate(self, batch: Batch, batch_idx: int, stage: str) -> None:
        images, targets = self._checked(batch)
        detections = self.detector.detect(self.model, images)
        found = [{n: x.float() if x.is_floating_point() else x for n, x in of.items()} for of in detections]
        known = [{name: of[name].to(kind) for name, kind in COCO_TRUTH.items() if name in of} for of in targets]
        self.coco[stage].update(found, known)
        for voc in self.voc[stage]:
            voc.update(found, targets)
        if self.val_loss:
            with isolate_rng():  # Faster R-CNN samples its proposals: alike every time, and training goes on as without
                torch.manual_seed(batch_idx)
                loss = self.loss(batch)
            self.log(f"{stage}_loss", loss, batch_size=len(images), sync_dist=True)
        if batch_idx == 0 and not self.trainer.sanity_checking and image_loggers(self.loggers):
            some = slice(self.drawn_images)
            drawn = self.draw_predictions((images[some], targets[some]), found[some])
            log_images(self.loggers, f"{stage}_detections", drawn, self.global_step)

    def on_validation_epoch_end(self) -> None:
        self._close("val")

    def on_test_epoch_end(self) -> None:
        results = self._close("test")
        per_class = torch.full((self.num_classes,), torch.nan)
        per_class[results["classes"].view(-1).long().cpu()] = _defined(results["map_per_class"]).view(-1).cpu()
        self.log_classes("test_map", per_class)

    def _close(self, stage: str) -> dict[str, Tensor]:
        results: dict[str, Tensor] = self.coco[stage].compute()
        self.coco[stage].reset()
        self.log_same({f"{stage}_{name}": _defined(results[name]) for name in COCO_NAMES})
        for suffix, voc in zip(MIN_SCORES, self.voc[stage], strict=False):
            self.log_same({f"{stage}_map_{name}{suffix}": value for name, value in voc.compute().items()})
            voc.reset()
        return results

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
    for flag in {"iscrowd", "difficult"} & target.keys():
        keep &= ~target[flag].bool()
    return {"boxes": target["boxes"][keep].float(), "labels": target["labels"][keep].long()}


def _defined(value: Tensor) -> Tensor:
    """NaN for -1, with which pycocotools says that there was nothing to find."""
    return value.float().where(value >= 0, torch.nan)
