"""Samples that are loaded when they are asked for: images with their masks or with their objects as a target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.ops import box_area, clip_boxes_to_image
from torchvision.transforms.v2 import functional as transform

from lightning_prune.data.transforms import IGNORE
from lightning_prune.errors import DataError

BadBoxes = Literal["refuse", "repair"]
Target = dict[str, Any]  # see `DetectionDataModule`
TOLERANCE = 2.0  # pixels


class Samples(Dataset[Any]):
    """What is loaded of items when it is asked for."""

    def __init__(self, items: Sequence[Any], load: Callable[[Any], Any]) -> None:
        self.items = items
        self.load = load

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.load(self.items[index])


def target_of(size: tuple[int, int], boxes: Any, labels: Any, image_id: int | str, **known: Any) -> Target:
    """The objects of one image; known of each: ``difficult``, ``iscrowd`` (else False), ``area`` (else the box's)."""
    corners = torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    unset = [False] * len(corners)
    flags = {of: torch.as_tensor(known.get(of, unset), dtype=torch.bool) for of in ("difficult", "iscrowd")}
    area = torch.as_tensor(known["area"], dtype=torch.float32) if "area" in known else box_area(corners)
    labels = torch.as_tensor(labels, dtype=torch.int64)
    return {"boxes": corners, "labels": labels, **flags, "area": area, "image_id": image_id, "orig_size": size}


def only(target: Target, rows: Tensor) -> Target:
    """The objects where ``rows`` (n,) is True."""
    return {name: value[rows] if isinstance(value, Tensor) else value for name, value in target.items()}


def plain(target: Target) -> Target:
    """The objects to train on: neither difficult nor a crowd."""
    return only(target, ~target["difficult"] & ~target["iscrowd"])


def check_boxes(target: Target, where: str, bad_boxes: BadBoxes = "refuse") -> Target:
    """Clip boxes that leave their image by no more than two pixels, as annotators round; refuse or repair worse ones.

    "repair" clips boxes that lie further outside or have no area, and leaves out those of which nothing remains.
    """
    boxes, (height, width) = target["boxes"], target["orig_size"]
    clipped = clip_boxes_to_image(boxes, (height, width))
    outside = (boxes - clipped).abs().amax(1)
    usable = (clipped[:, 2:] > clipped[:, :2]).all(1) & boxes.isfinite().all(1)
    bad = (outside > TOLERANCE) | ~usable
    if bad_boxes == "refuse" and bool(bad.any()):
        number = int(bad.nonzero()[0])
        what = "has no area" if outside[number] <= TOLERANCE else f"leaves it by {float(outside[number]):g} pixels"
        raise DataError(
            f"{where}: box {number + 1}, {[round(float(x), 2) for x in boxes[number]]} as x1 y1 x2 y2, in an image of "
            f"{width} x {height} {what}. Correct the annotation, or set bad_boxes: repair to clip such boxes and drop "
            "what is empty"
        )
    return only({**target, "boxes": clipped}, usable)


def check_files(paths: Sequence[Path], listed_in: Path | str) -> None:
    """Refuse a list of files that are not all there."""
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise DataError(
            f"{missing[0]} does not exist ({len(missing)} of {len(paths)} files listed in {listed_in} are missing); "
            "unpack the archive again"
        )


def read_image(path: Path, *, upright: bool = False) -> tv_tensors.Image:
    """An image file as (3, H, W) uint8; ``upright``: turned as its EXIF says, which viewers do."""
    try:
        with Image.open(path) as image:
            turned = ImageOps.exif_transpose(image) if upright else image
            return tv_tensors.Image(transform.pil_to_tensor(turned.convert("RGB")))
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise DataError(f"{path} is not a readable image ({error}); fetch it again") from error


def image_size(path: Path, *, upright: bool = False) -> tuple[int, int]:
    """Height and width of an image file, from its header alone; ``upright`` as in `read_image`."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            told = upright and (image.format != "PNG" or "exif" in image.info)  # a PNG is read to its end for it
            turned = told and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except (OSError, UnidentifiedImageError, SyntaxError) as error:
        raise DataError(f"{path} is not a readable image ({error}); fetch it again") from error
    return (width, height) if turned else (height, width)


def read_detection(
    item: tuple[Path, Target], transforms: Callable[..., Any], *, upright: bool = False
) -> tuple[Tensor, Target]:
    """Image (3, H, W) and target after the transforms, of an image file of the size that its target says."""
    path, target = item
    image = read_image(path, upright=upright)
    (height, width), size = image.shape[-2:], target["orig_size"]
    if (height, width) != size:
        raise DataError(
            f"{path} is {width} x {height}, but its annotation says {size[1]} x {size[0]}: boxes would be misplaced"
        )
    return detection_sample(image, target, transforms)


def detection_sample(image: Tensor, target: Target, transforms: Callable[..., Any]) -> tuple[Tensor, Target]:
    """Image and target after the transforms, as plain tensors; ``area`` is scaled as the boxes are."""
    boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=target["orig_size"])
    share = target["area"].double() / box_area(target["boxes"])  # of its box, which no transform changes
    moved, target = transforms(tv_tensors.Image(image), {**target, "boxes": boxes, "area": share})
    corners = target["boxes"].as_subclass(Tensor)
    area = (target["area"] * box_area(corners)).float()
    return moved.as_subclass(Tensor), {**target, "boxes": corners, "area": area}


def read_segmentation(
    item: tuple[Path, Path],
    read_classes: Callable[[Path], np.ndarray],
    num_classes: int,
    transforms: Callable[..., Any],
) -> tuple[Tensor, Tensor]:
    """Image (3, H, W) and mask (H, W) int64 after the transforms, of an image file and that of its classes."""
    return segmentation_sample(*read_masked(item, read_classes, num_classes), transforms)


def read_masked(
    item: tuple[Path, Path], read_classes: Callable[[Path], np.ndarray], num_classes: int
) -> tuple[Tensor, np.ndarray]:
    """Image (3, H, W) uint8 and classes (H, W) of an image file and that of its classes, of one size and known."""
    image, path = read_image(item[0]), item[1]
    classes = read_classes(path)
    if classes.shape != tuple(image.shape[-2:]):
        raise DataError(f"{path} is {classes.shape[::-1]}, but its image is {tuple(image.shape[-1:-3:-1])}")
    unknown = np.setdiff1d(classes, [*range(num_classes), IGNORE])
    if len(unknown):
        raise DataError(
            f"{path}: {unknown[0]} is none of {num_classes} classes, background included, nor {IGNORE}, ignored: set "
            "classes"
        )
    return image, classes


def segmentation_sample(image: Tensor, classes: np.ndarray, transforms: Callable[..., Any]) -> tuple[Tensor, Tensor]:
    """Image and mask int64 after the transforms, as plain tensors."""
    mask = tv_tensors.Mask(torch.from_numpy(classes.astype(np.int64)))
    moved, mask = transforms(tv_tensors.Image(image), mask)
    return moved.as_subclass(Tensor), mask.as_subclass(Tensor)
