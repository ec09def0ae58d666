"""What the segmentation and detection data modules share: datasets of files, batches, loaders, checks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as transform

from lightning_prune.data.transforms import IGNORE, Target
from lightning_prune.errors import DataError

BadBoxes = Literal["refuse", "repair"]
SegmentationBatch = tuple[Tensor, Tensor]
DetectionBatch = tuple[Tensor | list[Tensor], list[Target]]
TOLERANCE = 2.0  # pixels by which annotators' rounding may leave the image


@dataclass(frozen=True)
class Objects:
    """The objects of one image.

    Attributes:
        size: (height, width) of the image in pixels.
        boxes: (n, 4) float32, x1 y1 x2 y2 in pixels.
        labels: (n,) int64.
        difficult: (n,) bool, VOC's flag.
        iscrowd: (n,) bool, COCO's flag.
        area: (n,) float32, of the object or else of its box, in square pixels.
        image_id: number of the image.
    """

    size: tuple[int, int]
    boxes: Tensor
    labels: Tensor
    difficult: Tensor
    iscrowd: Tensor
    area: Tensor
    image_id: int

    def only(self, rows: Tensor) -> Objects:
        """The objects where ``rows`` (n,) is True."""
        return replace(
            self,
            boxes=self.boxes[rows],
            labels=self.labels[rows],
            difficult=self.difficult[rows],
            iscrowd=self.iscrowd[rows],
            area=self.area[rows],
        )

    def plain(self) -> Objects:
        """Those to train on: neither difficult nor a crowd."""
        return self.only(~self.difficult & ~self.iscrowd)


def check_boxes(objects: Objects, where: str, bad_boxes: BadBoxes = "refuse", tolerance: float = TOLERANCE) -> Objects:
    """Clip boxes that leave their image by no more than ``tolerance`` pixels; refuse or repair worse ones.

    Args:
        objects: of one image.
        where: file, and whatever else tells the image, for the message.
        bad_boxes: what happens to a box further outside or without area: "refuse", or "repair": clipped, and left out
            where nothing remains.
        tolerance: pixels.

    Raises:
        DataError: naming image, box and size.
    """
    height, width = objects.size
    limit = torch.tensor([width, height, width, height], dtype=torch.float32)
    boxes = objects.boxes
    outside = torch.maximum(-boxes, boxes - limit).clamp(min=0).amax(1)
    clipped = torch.minimum(boxes.clamp(min=0), limit)
    empty = (clipped[:, 2:] <= clipped[:, :2]).any(1)
    bad = (outside > tolerance) | empty | ~boxes.isfinite().all(1)
    if bad_boxes == "refuse" and bool(bad.any()):
        number = int(bad.nonzero()[0])
        what = "has no area" if outside[number] <= tolerance else f"leaves it by {float(outside[number]):g} pixels"
        raise DataError(
            f"{where}: box {number + 1}, {[round(float(x), 2) for x in boxes[number]]} as x1 y1 x2 y2, in an image of "
            f"{width} x {height} {what}. Correct the annotation, or set bad_boxes: repair to clip such boxes and drop "
            "what is empty"
        )
    return replace(objects, boxes=clipped).only(~empty & boxes.isfinite().all(1))


def read_image(path: Path) -> tv_tensors.Image:
    """An image file as (3, H, W) uint8.

    Raises:
        DataError: naming the file.
    """
    try:
        with Image.open(path) as image:
            return tv_tensors.Image(transform.pil_to_tensor(image.convert("RGB")))
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise DataError(f"{path} is not a readable image ({error}); fetch it again") from error


def check_files(paths: Sequence[Path], listed_in: Path | str) -> None:
    """Refuse a list of files that are not all there.

    Raises:
        DataError: naming the first, how many, and where they are listed.
    """
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(
            f"{missing[0]} does not exist ({len(missing)} of {len(paths)} files listed in {listed_in} are missing); "
            "unpack the archive again"
        )


class DetectionFiles(Dataset[tuple[Tensor, Target]]):
    """Image files with their objects, as (image (3, H, W) in [0, 1], target).

    Args:
        paths: image files.
        objects: of every image.
        transforms: of (image, target), ending in float images.
    """

    def __init__(self, paths: Sequence[Path], objects: Sequence[Objects], transforms: Callable[..., Any]) -> None:
        self.paths = list(paths)
        self.objects = list(objects)
        self.transforms = transforms

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        image, objects = read_image(self.paths[index]), self.objects[index]
        if tuple(image.shape[-2:]) != objects.size:
            height, width = image.shape[-2:]
            raise DataError(
                f"{self.paths[index]} is {width} x {height}, but its annotation says {objects.size[1]} x "
                f"{objects.size[0]}: boxes would be misplaced"
            )
        return detection_sample(image, objects, self.transforms)


def detection_sample(
    image: tv_tensors.Image, objects: Objects, transforms: Callable[..., Any]
) -> tuple[Tensor, Target]:
    """Image and target after the transforms, as plain tensors; ``area`` is scaled as the boxes are."""
    box_area = _area(objects.boxes)
    target: Target = {
        "boxes": tv_tensors.BoundingBoxes(objects.boxes, format="XYXY", canvas_size=objects.size),
        "labels": objects.labels,
        "difficult": objects.difficult,
        "iscrowd": objects.iscrowd,
        "area": objects.area.double() / box_area,  # the share of its box, which no transform changes
        "image_id": objects.image_id,
        "orig_size": objects.size,
    }
    moved, target = transforms(image, target)
    boxes = target["boxes"].as_subclass(Tensor)
    return moved.as_subclass(Tensor), {**target, "boxes": boxes, "area": (target["area"] * _area(boxes)).float()}


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def detection_batch(samples: list[tuple[Tensor, Target]]) -> DetectionBatch:
    """(images, targets); images are stacked where they are of one size, else a list."""
    images = [image for image, _ in samples]
    same = all(image.shape == images[0].shape for image in images)
    return torch.stack(images) if same else images, [target for _, target in samples]


def segmentation_batch(samples: list[SegmentationBatch]) -> SegmentationBatch:
    """(images, masks), padded right and below to the largest: 0 in images, 255, ignored, in masks."""
    height, width = (max(mask.shape[side] for _, mask in samples) for side in (0, 1))

    def padded(x: Tensor, value: int) -> Tensor:
        return F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]), value=value)

    images = torch.stack([padded(image, 0) for image, _ in samples])
    return images, torch.stack([padded(mask, IGNORE) for _, mask in samples])


class PartsDataModule(LightningDataModule, ABC):
    """A data module of the parts "train", "val" and "test", which are loaded when they are first needed.

    Attributes:
        collate: makes a batch of samples.
    """

    collate: Callable[[list[Any]], Any]

    def __init__(self, batch_size: int, num_workers: int, drop_last: bool) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.drop_last = drop_last
        self.parts: dict[str, Dataset[Any]] = {}

    @abstractmethod
    def _load(self) -> dict[str, Dataset[Any]]:
        """The parts "train", "val" and "test"."""

    @final
    def setup(self, stage: str | None = None) -> None:
        if not self.parts:
            parts = self._load()
            for name, part in parts.items():
                if isinstance(part, Sized) and not len(part):
                    raise DataError(f"{type(self).__name__}: the {name} part holds no image")
            self.parts = parts

    def train_dataloader(self) -> DataLoader[Any]:
        part = self.parts["train"]
        if self.drop_last and isinstance(part, Sized) and len(part) < self.batch_size:
            raise DataError(
                f"{type(self).__name__}: {len(part)} training images are less than one batch of {self.batch_size}, and "
                "drop_last leaves them out: lower batch_size, or set drop_last: false"
            )
        return self._loader("train", shuffle=True, drop_last=self.drop_last)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test")

    def _loader(self, part: str, **options: Any) -> DataLoader[Any]:
        return DataLoader(
            self.parts[part],
            self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=type(self).collate,
            **options,
        )


class SegmentationDataModule(PartsDataModule):
    """Batches of images (N, 3, H, W), standardised, and masks (N, H, W) int64, 255 where nothing is asked for."""

    collate = staticmethod(segmentation_batch)


class DetectionDataModule(PartsDataModule):
    """Batches of images in [0, 1], (N, 3, H, W) or a list of (3, H, W), and a list of targets.

    A target holds ``boxes`` (n, 4) x1 y1 x2 y2 in pixels, ``labels`` (n,) from 0, ``difficult`` and ``iscrowd`` (n,)
    bool, ``area`` (n,), ``image_id`` and ``orig_size`` (height, width).
    """

    collate = staticmethod(detection_batch)
