"""How `DetectionTask` talks to a network: its losses on true boxes, and the boxes that it finds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.ssd import SSD
from torchvision.ops import batched_nms, clip_boxes_to_image

from lightning_prune.models.yolo_boxes import decode, letterbox
from lightning_prune.models.yolo_parts import YoloNetwork
from lightning_prune.tasks.deployed import DeployedYolo
from lightning_prune.tasks.yolo_losses import Truths, ciou_loss, darknet_loss

Images = Sequence[Tensor] | Tensor
Detections = dict[str, Tensor]
Target = dict[str, Any]
YoloLoss = Literal["ciou", "darknet"]
_TORCHVISION = (FasterRCNN, RetinaNet, SSD, FCOS)


class Detector(ABC):
    """What `DetectionTask` needs to know of a kind of network; derive from it for a network of your own.

    Images are (C, H, W) in [0, 1], each of its own size or stacked; targets have ``boxes`` (n, 4), xyxy in the image's
    pixels, and ``labels`` (n,) from 0 without background. So has what `detect` returns, with ``scores`` (n,) besides.
    """

    @abstractmethod
    def check(self, model: nn.Module, num_classes: int) -> None:
        """Raise ValueError if the network does not predict that many classes."""

    @abstractmethod
    def example(self, images: Tensor) -> Any:
        """The only argument of the network's forward, made of stacked images."""

    @abstractmethod
    def losses(self, model: nn.Module, images: Images, targets: Sequence[Target], step: int) -> dict[str, Tensor]:
        """Named scalars whose sum is the loss, in train and in eval mode; ``step`` counts the optimizer's steps."""

    @abstractmethod
    def detect(self, model: nn.Module, images: Images) -> list[Detections]:
        """The boxes found in every image, in eval mode."""

    def deployed(self, model: nn.Module, *, nms: bool) -> nn.Module:
        """What is exported of the network: itself, unless the detector knows better.

        Raises:
            ValueError: overlapping boxes cannot be suppressed in a file.
        """
        if nms:
            raise ValueError(f"{type(self).__name__} does not say how to suppress boxes of {type(model).__name__}")
        return model


@dataclass(frozen=True)
class MultiScale:
    """Training on inputs of changing size, as darknet does.

    The size depends on the step and the seed alone, so that a resumed run goes on as it would have.

    Args:
        smallest: side in pixels, a multiple of 32.
        largest: side in pixels, a multiple of 32.
        every: steps between changes.
        seed: of the draws.

    Example:
        >>> sizes = MultiScale(64, 128, every=2)
        >>> [sizes.at(step) for step in range(8)]
        [128, 128, 96, 96, 64, 64, 96, 96]
    """

    smallest: int = 320
    largest: int = 608
    every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.smallest <= self.largest or self.smallest % 32 or self.largest % 32 or self.every < 1:
            raise ValueError(f"MultiScale needs multiples of 32, smallest <= largest, and every >= 1, got {self}")

    def at(self, step: int) -> int:
        """Side in pixels at a step."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + step // self.every)
        steps = (self.largest - self.smallest) // 32 + 1
        return self.smallest + 32 * int(torch.randint(steps, (), generator=generator))


@dataclass(eq=False)
class YoloDetector(Detector):
    """YOLOv3 and YOLOv3-tiny: letterboxes images, decodes head maps, suppresses overlapping boxes of a class.

    Args:
        size: side of the network's input in pixels, a multiple of 32; images are letterboxed to it.
        loss: ``ciou`` or ``darknet``, see `lightning_prune.tasks.yolo_losses`.
        ignore_threshold: of the darknet loss.
        multi_scale: changing sizes in training; None: always ``size``.
        min_score: boxes with a lower score are dropped.
        nms_threshold: of two boxes of one class that overlap more, the one with the lower score is dropped.
        max_candidates: boxes per image that enter this suppression, those with the highest scores.
        max_detections: boxes per image that are kept.

    Raises:
        ValueError: a size that is no multiple of 32, an unknown loss, or a threshold outside [0, 1].
    """

    size: int = 416
    _: KW_ONLY
    loss: YoloLoss = "ciou"
    ignore_threshold: float = 0.5
    multi_scale: MultiScale | None = None
    min_score: float = 0.005
    nms_threshold: float = 0.45
    max_candidates: int = 3000
    max_detections: int = 300

    def __post_init__(self) -> None:
        if self.size < 32 or self.size % 32:
            raise ValueError(f"size must be a multiple of 32, got {self.size}")
        if self.loss not in get_args(YoloLoss):
            raise ValueError(f"loss must be one of {', '.join(get_args(YoloLoss))}, got {self.loss!r}")
        for name in ("ignore_threshold", "min_score", "nms_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")

    def check(self, model: nn.Module, num_classes: int) -> None:
        _same_classes(model, _yolo(model).num_classes, num_classes)

    def example(self, images: Tensor) -> Tensor:
        return letterbox(images, self.size)[0]

    def losses(self, model: nn.Module, images: Images, targets: Sequence[Target], step: int) -> dict[str, Tensor]:
        size = self.multi_scale.at(step) if self.multi_scale is not None and model.training else self.size
        batch, placements = letterbox(images, size)
        boxes = [place.to_network(target["boxes"]) for place, target in zip(placements, targets, strict=True)]
        truths = Truths.of(boxes, [target["labels"] for target in targets])
        maps = _in_full(model(batch))
        if self.loss == "ciou":
            return ciou_loss(maps, truths, _yolo(model))
        return darknet_loss(maps, truths, _yolo(model), ignore_threshold=self.ignore_threshold)

    def deployed(self, model: nn.Module, *, nms: bool) -> nn.Module:
        return DeployedYolo(
            _yolo(model),
            candidates=self.max_candidates,
            nms=nms,
            threshold=self.nms_threshold,
            min_score=self.min_score,
            kept=self.max_detections,
        )

    def detect(self, model: nn.Module, images: Images) -> list[Detections]:
        batch, placements = letterbox(images, self.size)
        found = zip(*decode(_in_full(model(batch)), _yolo(model)), placements, strict=True)
        results = []
        for boxes, scores, placement in found:
            # Suppression keeps classes apart by shifts beyond the largest box, which an exploded one would void.
            boxes = boxes.clamp(-self.size, 2 * self.size)
            place, label = (scores > self.min_score).nonzero(as_tuple=True)
            score = scores[place, label]
            if len(score) > self.max_candidates:
                score, order = score.topk(self.max_candidates)
                place, label = place[order], label[order]
            kept = batched_nms(boxes[place], score, label, self.nms_threshold)[: self.max_detections]
            inside = clip_boxes_to_image(placement.to_image(boxes[place[kept]]), placement.size)
            results.append({"boxes": inside, "scores": score[kept], "labels": label[kept]})
        return results


@dataclass(eq=False)
class TorchvisionDetector(Detector):
    """torchvision's Faster R-CNN, RetinaNet, SSD, SSDLite and FCOS, or a network with their interface.

    In train mode such a network maps a list of images and one of targets to a dict of losses, in eval mode images to
    boxes, labels and scores; it scales and normalises images itself. Thresholds are the network's own.

    Args:
        background: whether label 0 means background, as in Faster R-CNN and SSD; None: known from the network's type.
    """

    background: bool | None = None

    def check(self, model: nn.Module, num_classes: int) -> None:
        if isinstance(model, MaskRCNN | KeypointRCNN):
            raise ValueError(f"{type(model).__name__} trains on more than boxes, which is all that targets hold here")
        outputs = None  # labels told apart, background included; None: not known
        if isinstance(model, FasterRCNN):
            outputs = getattr(getattr(model.roi_heads.box_predictor, "cls_score", None), "out_features", None)
        elif isinstance(model, _TORCHVISION):
            head: Any = model.head.classification_head
            outputs = head.num_columns if isinstance(model, SSD) else head.num_classes
        if outputs is not None:
            _same_classes(model, outputs, num_classes, self._offset(model))

    def example(self, images: Tensor) -> list[Tensor]:
        return list(images)

    def losses(self, model: nn.Module, images: Images, targets: Sequence[Target], step: int) -> dict[str, Tensor]:
        offset = self._offset(model)
        shifted = [{"boxes": target["boxes"], "labels": target["labels"] + offset} for target in targets]
        before = [(module, module.training) for module in model.modules()]
        for module, _ in before:  # those that call others decide what is returned; batch norm, dropout... stay
            module.training |= module is model or any(True for _ in module.children())
        try:
            return model(list(images), shifted)
        finally:
            for module, training in before:
                module.training = training

    def detect(self, model: nn.Module, images: Images) -> list[Detections]:
        offset = self._offset(model)
        return [
            {"boxes": found["boxes"], "scores": found["scores"], "labels": found["labels"] - offset}
            for found in model(list(images))
        ]

    def _offset(self, model: nn.Module) -> int:
        if self.background is not None:
            return int(self.background)
        if not isinstance(model, _TORCHVISION):
            raise ValueError(
                f"{type(model).__name__} is none of torchvision's detectors; say "
                "TorchvisionDetector(background=True) if its label 0 is the background, else background=False"
            )
        return int(isinstance(model, FasterRCNN | SSD))


def detector_for(model: nn.Module) -> Detector:
    """The detector for a network, by its type."""
    if isinstance(model, YoloNetwork):
        return YoloDetector()
    if isinstance(model, _TORCHVISION):
        return TorchvisionDetector()
    raise ValueError(
        f"DetectionTask does not know {type(model).__name__}; give it detector=..., a lightning_prune.tasks.Detector "
        "that says how to get losses and boxes from it"
    )


def _yolo(model: nn.Module) -> YoloNetwork:
    if not isinstance(model, YoloNetwork):
        raise ValueError(f"YoloDetector takes YoloV3 or YoloV3Tiny, got {type(model).__name__}")
    return model


def _in_full(maps: Sequence[Tensor]) -> list[Tensor]:
    """Half precision is too coarse for exp and for sums over ten thousand cells."""
    return [head if head.dtype == torch.float64 else head.float() for head in maps]


def _same_classes(model: nn.Module, outputs: int, wanted: int, offset: int = 0) -> None:
    if outputs - offset != wanted:
        note = " (background is one of them)" if offset else ""
        raise ValueError(
            f"{type(model).__name__} predicts {outputs - offset} classes and the task has {wanted}: build the network "
            f"with num_classes={wanted + offset}{note}"
        )
