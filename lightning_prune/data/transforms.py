"""What is done to images, masks and boxes before a network sees them: torchvision's transforms on its tv_tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from lightning_prune.errors import DataError
from lightning_prune.models.yolo_boxes import fitted

GREY = 128  # what is outside of an image, as in darknet
IGNORE = 255  # a mask's value where no class is asked for
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Augmentation = Literal["none", "flip", "yolo", "ssd"]
_TO_FLOAT = v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)
_NORMALISED = (_TO_FLOAT, v2.Normalize(IMAGENET_MEAN, IMAGENET_STD))


def segmentation_training(base: int = 520, crop: int | Sequence[int] = 480) -> v2.Compose:
    """Torchvision's reference, and LR's: shorter side 0.5 to 2 times ``base``, flip, crop, ImageNet's normalisation.

    ``crop``: a side, or height and width. Outside of the image it is 0 in the image and 255, ignored, in the mask.
    """
    return v2.Compose(
        [
            v2.RandomResize(base // 2, base * 2, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomCrop(crop, pad_if_needed=True, fill={tv_tensors.Mask: IGNORE, "others": 0}),
            *_NORMALISED,
        ]
    )


def segmentation_evaluation(base: int | None = 520) -> v2.Compose:
    """Shorter side to ``base`` pixels (None: as it is), ImageNet's normalisation."""
    resize = [] if base is None else [v2.Resize(base, antialias=True)]
    return v2.Compose([*resize, *_NORMALISED])


class Letterbox(v2.Transform):
    """Scale an image to fit a square, both sides alike, and fill the rest with grey, half above and half below."""

    _transformed_types = (tv_tensors.Image, tv_tensors.BoundingBoxes, tv_tensors.Mask)

    def __init__(self, size: int = 416) -> None:
        super().__init__()
        self.size = size

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        rows, columns = v2.functional.get_size(inpt)
        height, width = fitted(rows, columns, self.size)
        down, across = self.size - height, self.size - width
        resized = v2.functional.resize(inpt, [height, width], antialias=True)
        fill = IGNORE if isinstance(inpt, tv_tensors.Mask) else GREY
        return v2.functional.pad(resized, [across // 2, down // 2, across - across // 2, down - down // 2], fill=fill)


class DarknetJitter(v2.Transform):
    """Darknet's jitter: move every edge of the image by up to a share of its side, inwards or outwards (grey)."""

    _transformed_types = (tv_tensors.Image, tv_tensors.BoundingBoxes)

    def __init__(self, jitter: float = 0.3) -> None:
        super().__init__()
        self.jitter = jitter

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """How far the left, top, right and bottom edges move outwards."""
        height, width = v2.query_size(flat_inputs)
        moves = (torch.rand(4) * 2 - 1) * self.jitter * torch.tensor([width, height, width, height])
        return {"moves": [int(move) for move in moves]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        left, top, right, bottom = params["moves"]
        height, width = v2.functional.get_size(inpt)
        padded = v2.functional.pad(inpt, [max(0, move) for move in params["moves"]], fill=GREY)
        return v2.functional.crop(padded, max(0, -top), max(0, -left), height + top + bottom, width + left + right)


def detection_training(augment: Augmentation = "yolo", size: int | None = 416) -> v2.Compose:
    """Augmentation of images and boxes, then a letterbox of side ``size`` (None: images keep their size).

    ``flip``: left and right swapped at random. ``yolo``: darknet's hue 0.1, saturation and exposure 1.5, jitter 0.3 and
    flip. ``ssd``: torchvision's reference, photometric distortion, zoom out, crop by overlap, and flip. Boxes of which
    less than two pixels are left go.
    """
    flip = v2.RandomHorizontalFlip()
    colours = v2.ColorJitter(brightness=(2 / 3, 1.5), saturation=(2 / 3, 1.5), hue=0.1)
    zoom = v2.RandomZoomOut(fill={tv_tensors.Image: (123, 117, 104), "others": 0})
    known: dict[str, list[nn.Module]] = {
        "none": [],
        "flip": [flip],
        "yolo": [colours, DarknetJitter(), flip],
        "ssd": [v2.RandomPhotometricDistort(), zoom, v2.RandomIoUCrop(), flip],
    }
    if augment not in known:
        raise DataError(f"augment must be one of {', '.join(known)}, got {augment!r}")
    letterbox = [] if size is None else [Letterbox(size)]
    tidy = [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(2.0, labels_getter=_rows)]
    return v2.Compose([*known[augment], *letterbox, *tidy, _TO_FLOAT])


def detection_evaluation(size: int | None = 416) -> v2.Compose:
    """A letterbox alone, as in `detection_training`; every box stays."""
    letterbox = [] if size is None else [Letterbox(size)]
    return v2.Compose([*letterbox, v2.ClampBoundingBoxes(), _TO_FLOAT])


def _rows(sample: tuple[Any, dict[str, Any]]) -> tuple[Tensor, ...]:
    """What goes with a box when it goes."""
    return tuple(sample[1][name] for name in ("labels", "iscrowd", "difficult", "area"))
