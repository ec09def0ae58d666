"""Pascal VOC's files: image sets, annotations, masks; and the masks of the Semantic Boundaries Dataset."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from torchvision import datasets
from torchvision.datasets.voc import DATASET_YEAR_DICT

from lightning_prune.data.samples import (
    BadBoxes,
    Samples,
    Target,
    check_boxes,
    check_files,
    read_segmentation,
    target_of,
)
from lightning_prune.errors import DataError


def listing(kind: Any, root: str, name: str, *, download: bool = False) -> list[tuple[Path, Path]]:
    """Image files of an image set "YEAR/SET", each with its annotation or mask.

    Args:
        kind: torchvision's dataset, `VOCDetection` or `VOCSegmentation`.
        root: folder that holds ``VOCdevkit``.
        name: of the image set.
        download: fetch it into the folder first.

    Raises:
        DataError: a missing folder or file, with the way to get it.
    """
    year, _, image_set = name.partition("/")
    folder = Path(root).resolve()
    try:
        found = kind(str(folder), year=year, image_set=image_set, download=download)
    except ValueError as error:
        raise DataError(f"image sets are named YEAR/SET, such as 2012/train, got {name!r} ({error})") from error
    except (RuntimeError, OSError) as error:
        devkit = folder / ("TrainVal/VOCdevkit" if year == "2011" else "VOCdevkit") / f"VOC{year}"
        problem = f"has no usable image set {image_set!r}" if devkit.is_dir() else "does not exist"
        raise DataError(
            f"Pascal VOC: {devkit} {problem} ({error}). Set download: true, or unpack "
            f"{_archive(year, image_set)} of host.robots.ox.ac.uk/pascal/VOC into {folder}"
        ) from error
    pairs = [(Path(image), Path(target)) for image, target in zip(found.images, found.targets, strict=True)]
    check_files([path for pair in pairs for path in pair], f"image set {name} of {folder}")
    return pairs


def fetch(kind: Any, root: str, names: Sequence[str]) -> None:
    """Download the image sets that are not there; torchvision would unpack 2 GB again for each."""
    for name in names:
        try:
            listing(kind, root, name)
        except DataError:
            listing(kind, root, name, download=True)


def _archive(year: str, image_set: str) -> str:
    return DATASET_YEAR_DICT["2007-test" if (year, image_set) == ("2007", "test") else year]["filename"]


def read_annotation(path: Path, classes: Sequence[str], image_id: int = 0, bad_boxes: BadBoxes = "refuse") -> Target:
    """One of VOC's XML files. Its boxes count pixels from 1 and include the last: (x1 - 1, y1 - 1, x2, y2) here.

    Args:
        path: the file.
        classes: names of the classes, in the order of the labels.
        image_id: number to give the image.
        bad_boxes: see `check_boxes`.

    Raises:
        DataError: naming the file, and the line or the object.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        line, column = error.position
        raise DataError(f"{path}, line {line}, column {column + 1}: no valid XML ({error}); unpack it again") from error
    except (LookupError, ValueError) as error:  # of the encoding that the first line names
        raise DataError(f"{path}, line 1: no valid XML ({error}); unpack it again") from error
    size = int(_number(root, "size/height", str(path))), int(_number(root, "size/width", str(path)))
    boxes, labels, difficult = [], [], []
    for number, item in enumerate(root.findall("object"), 1):
        where = f"{path}, object {number}"
        name = (item.findtext("name") or "").strip()
        if name not in classes:
            raise DataError(f"{where}: unknown class {name!r}; the classes are {', '.join(classes)}: set classes")
        x1, y1, x2, y2 = (_number(item, f"bndbox/{edge}", where) for edge in ("xmin", "ymin", "xmax", "ymax"))
        boxes.append([x1 - 1, y1 - 1, x2, y2])
        labels.append(list(classes).index(name))
        difficult.append((item.findtext("difficult") or "0").strip() == "1")
    return check_boxes(target_of(size, boxes, labels, image_id, difficult=difficult), str(path), bad_boxes)


def _number(element: ElementTree.Element, name: str, where: str) -> float:
    text = element.findtext(name)
    try:
        number = float(text or "")
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{where}: {name} is {'missing' if text is None else repr(text)}, not a number")
    return number


def read_classes(path: Path) -> np.ndarray:
    """The class numbers (H, W) of a palette PNG.

    Raises:
        DataError: a file that is no image, or is not of class numbers.
    """
    try:
        with Image.open(path) as image:
            mode, classes = image.mode, np.array(image)
    except (OSError, SyntaxError) as error:
        raise DataError(f"{path} is not a readable mask ({error}); unpack it again") from error
    if mode not in ("P", "L"):
        raise DataError(f"{path} holds colours (mode {mode}), not class numbers; use VOC's palette PNGs")
    return classes


def sbd_masks(root: str, num_classes: int, transforms: Callable[..., Any]) -> Samples:
    """Images of the Semantic Boundaries Dataset that are not in VOC's val, with their masks.

    Raises:
        DataError: a missing folder or file, with the way to get it.
    """
    try:
        files = datasets.SBDataset(root, image_set="train_noval", mode="segmentation")
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"SBD: {Path(root).resolve()} does not hold img, cls and train_noval.txt ({error}). Unpack "
            f"{datasets.SBDataset.url} and add {datasets.SBDataset.voc_train_url}"
        ) from error
    items = [(Path(image), Path(mask)) for image, mask in zip(files.images, files.masks, strict=True)]
    check_files([path for item in items for path in item], "SBD's train_noval.txt")
    read = partial(_sbd_classes, files)
    return Samples(items, partial(read_segmentation, read_classes=read, num_classes=num_classes, transforms=transforms))


def _sbd_classes(files: Any, path: Path) -> np.ndarray:
    return np.array(files._get_target(str(path)))
