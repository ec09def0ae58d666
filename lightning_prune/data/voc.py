"""Pascal VOC: segmentation and detection, from the original folders."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset
from torchvision import tv_tensors

from lightning_prune.data.modules import (
    BadBoxes,
    DetectionDataModule,
    DetectionFiles,
    Objects,
    SegmentationDataModule,
    check_boxes,
    check_files,
    read_image,
)
from lightning_prune.data.transforms import (
    IGNORE,
    Augmentation,
    detection_evaluation,
    detection_training,
    segmentation_evaluation,
    segmentation_training,
)
from lightning_prune.errors import DataError

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


class VOCSegmentation(SegmentationDataModule):
    """Pascal VOC's class masks, with torchvision's reference transforms, which Lee et al. (Sensors 23(4):2102) use.

    Training images (N, 3, crop, crop): shorter side resized to 0.5 to 2 times ``base``, flipped, cropped, normalised.
    Evaluation images keep their shape at a shorter side of ``base``; a batch is padded to its largest. Masks
    (N, H, W): 0 for background, then the classes; 255, the border of objects and the padding, counts nowhere.

    Args:
        root: folder that holds, or will hold, ``VOCdevkit``.
        batch_size: images per batch.
        train_on: image sets to train on, as "YEAR/SET".
        evaluate_on: image sets to validate and test on.
        classes: names of the classes after background; other than VOC's for data of one's own in VOC's format.
        base: shorter side of evaluation images in pixels; training images vary around it.
        crop: height and width of training images.
        sbd_root: folder of the Semantic Boundaries Dataset (``img``, ``cls``, ``train_noval.txt``), whose images that
            are not in VOC's val are trained on too.
        download: fetch VOC if it is not there (2 GB a year).
        drop_last: leave out the last, smaller training batch.
        num_workers: processes that load.

    Raises:
        DataError: a missing folder or file, with the way to get it; while loading, a damaged image, or a mask that is
            not of class numbers.
    """

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 16,
        *,
        train_on: Sequence[str] = ("2012/train",),
        evaluate_on: Sequence[str] = ("2012/val",),
        classes: Sequence[str] = VOC_CLASSES,
        base: int = 520,
        crop: int = 480,
        sbd_root: str | None = None,
        download: bool = False,
        drop_last: bool = True,
        num_workers: int = 2,
    ) -> None:
        super().__init__(batch_size, num_workers, drop_last)
        self.root = root
        self.train_on = tuple(train_on)
        self.evaluate_on = tuple(evaluate_on)
        self.class_names = ("background", *classes)
        self.num_classes = len(self.class_names)
        self.base = base
        self.crop = crop
        self.sbd_root = sbd_root
        self.download = download

    def prepare_data(self) -> None:
        if self.download:
            _fetch("VOCSegmentation", self.root, (*self.train_on, *self.evaluate_on))

    def _load(self) -> dict[str, Dataset[Any]]:
        training = segmentation_training(self.base, self.crop)
        train = [self._part(name, training) for name in self.train_on]
        if self.sbd_root is not None:
            train.append(_SbdMasks(self.sbd_root, training))
        evaluation = segmentation_evaluation(self.base)
        val: Dataset[Any] = ConcatDataset([self._part(name, evaluation) for name in self.evaluate_on])
        return {"train": ConcatDataset(train), "val": val, "test": val}

    def _part(self, name: str, transforms: Callable[..., Any]) -> Dataset[Any]:
        paths, masks = _listing("VOCSegmentation", self.root, name)
        return _VocMasks(paths, masks, self.num_classes, transforms)


class VOCDetection(DetectionDataModule):
    """Pascal VOC's boxes, letterboxed; targets as in `DetectionDataModule`, labels in the order of ``classes``.

    Objects marked difficult are evaluated with their flag and not trained on. Images without an object stay, as
    negatives. All annotations are read and checked before training starts.

    Args:
        root: folder that holds, or will hold, ``VOCdevkit``.
        batch_size: images per batch.
        train_on: image sets to train on, as "YEAR/SET"; ("2007/trainval", "2012/trainval") is the usual large one.
        evaluate_on: image sets to validate and test on, such as ("2007/test",).
        classes: names of the classes.
        size: side of the letterbox in pixels; None: images keep their sizes and come as a list.
        augment: of training images: "none", "flip", "yolo" or "ssd", see `detection_training`.
        bad_boxes: see `check_boxes`.
        download: fetch the data if they are not there.
        drop_last: leave out the last, smaller training batch.
        num_workers: processes that load.

    Raises:
        DataError: a missing folder or file, with the way to get it; an annotation that is no XML, with its line, or
            lacks something, or names an unknown class, or a box outside its image.
    """

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 16,
        *,
        train_on: Sequence[str] = ("2012/train",),
        evaluate_on: Sequence[str] = ("2012/val",),
        classes: Sequence[str] = VOC_CLASSES,
        size: int | None = 416,
        augment: Augmentation = "yolo",
        bad_boxes: BadBoxes = "refuse",
        download: bool = False,
        drop_last: bool = True,
        num_workers: int = 2,
    ) -> None:
        super().__init__(batch_size, num_workers, drop_last)
        self.root = root
        self.train_on = tuple(train_on)
        self.evaluate_on = tuple(evaluate_on)
        self.class_names = tuple(classes)
        self.num_classes = len(self.class_names)
        self.bad_boxes = bad_boxes
        self.download = download
        self.training = detection_training(augment, size)
        self.evaluation = detection_evaluation(size)

    def prepare_data(self) -> None:
        if self.download:
            _fetch("VOCDetection", self.root, (*self.train_on, *self.evaluate_on))

    def _load(self) -> dict[str, Dataset[Any]]:
        val = self._part(self.evaluate_on, self.evaluation, train=False)
        return {"train": self._part(self.train_on, self.training, train=True), "val": val, "test": val}

    def _part(self, names: Sequence[str], transforms: Callable[..., Any], *, train: bool) -> DetectionFiles:
        paths: list[Path] = []
        objects: list[Objects] = []
        for name in names:
            images, annotations = _listing("VOCDetection", self.root, name)
            for image, annotation in zip(images, annotations, strict=True):
                found = read_annotation(annotation, self.class_names, len(paths), self.bad_boxes)
                paths.append(image)
                objects.append(found.plain() if train else found)
        return DetectionFiles(paths, objects, transforms)


def read_annotation(path: Path, classes: Sequence[str], image_id: int = 0, bad_boxes: BadBoxes = "refuse") -> Objects:
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
    corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    found = Objects(
        size,
        corners,
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(difficult, dtype=torch.bool),
        torch.zeros(len(labels), dtype=torch.bool),
        (corners[:, 2:] - corners[:, :2]).prod(1),
        image_id,
    )
    return check_boxes(found, str(path), bad_boxes)


def _number(element: ElementTree.Element, name: str, where: str) -> float:
    text = element.findtext(name)
    try:
        number = float(text or "")
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{where}: {name} is {'missing' if text is None else repr(text)}, not a number")
    return number


def _listing(kind: str, root: str, name: str, *, download: bool = False) -> tuple[list[Path], list[Path]]:
    """Image files and target files of an image set "YEAR/SET"."""
    from torchvision import datasets

    year, _, image_set = name.partition("/")
    folder = Path(root).resolve()
    try:
        found = getattr(datasets, kind)(str(folder), year=year, image_set=image_set, download=download)
    except ValueError as error:
        raise DataError(f"image sets are named YEAR/SET, such as 2012/train, got {name!r} ({error})") from error
    except (RuntimeError, OSError) as error:
        devkit = folder / ("TrainVal/VOCdevkit" if year == "2011" else "VOCdevkit") / f"VOC{year}"
        problem = f"has no usable image set {image_set!r}" if devkit.is_dir() else "does not exist"
        raise DataError(
            f"Pascal VOC: {devkit} {problem} ({error}). Set download: true, or unpack "
            f"{_archive(year, image_set)} of host.robots.ox.ac.uk/pascal/VOC into {folder}"
        ) from error
    images, targets = [Path(path) for path in found.images], [Path(path) for path in found.targets]
    check_files([*images, *targets], f"image set {name} of {folder}")
    return images, targets


def _fetch(kind: str, root: str, names: Sequence[str]) -> None:
    """Download the image sets that are not there; torchvision would unpack 2 GB again for each."""
    for name in names:
        try:
            _listing(kind, root, name)
        except DataError:
            _listing(kind, root, name, download=True)


def _archive(year: str, image_set: str) -> str:
    from torchvision.datasets.voc import DATASET_YEAR_DICT

    return DATASET_YEAR_DICT["2007-test" if (year, image_set) == ("2007", "test") else year]["filename"]


class _VocMasks(Dataset[tuple[Tensor, Tensor]]):
    def __init__(
        self, paths: Sequence[Path], masks: Sequence[Path], num_classes: int, transforms: Callable[..., Any]
    ) -> None:
        self.paths = paths
        self.masks = masks
        self.num_classes = num_classes
        self.transforms = transforms

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path = self.masks[index]
        try:
            with Image.open(path) as image:
                mode, classes = image.mode, np.array(image)
        except (OSError, SyntaxError) as error:
            raise DataError(f"{path} is not a readable mask ({error}); unpack it again") from error
        if mode not in ("P", "L"):
            raise DataError(f"{path} holds colours (mode {mode}), not class numbers; use VOC's palette PNGs")
        return masked_sample(read_image(self.paths[index]), classes, self.num_classes, path, self.transforms)


class _SbdMasks(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, root: str, transforms: Callable[..., Any]) -> None:
        from torchvision.datasets import SBDataset

        try:
            self.files = SBDataset(root, image_set="train_noval", mode="segmentation")
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"SBD: {Path(root).resolve()} does not hold img, cls and train_noval.txt ({error}). Unpack "
                f"{SBDataset.url} and add {SBDataset.voc_train_url}"
            ) from error
        check_files([Path(path) for path in (*self.files.images, *self.files.masks)], "SBD's train_noval.txt")
        self.transforms = transforms

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path = Path(self.files.masks[index])
        image = read_image(Path(self.files.images[index]))
        classes = np.array(self.files._get_target(str(path)))
        return masked_sample(image, classes, len(VOC_CLASSES) + 1, path, self.transforms)


def masked_sample(
    image: tv_tensors.Image, classes: np.ndarray, num_classes: int, path: Path, transforms: Callable[..., Any]
) -> tuple[Tensor, Tensor]:
    """Image (3, H, W) and mask (H, W) int64 after the transforms.

    Raises:
        DataError: a mask of another size, or a number that is no class.
    """
    if classes.shape != tuple(image.shape[-2:]):
        raise DataError(f"{path} is {classes.shape[::-1]}, but its image is {tuple(image.shape[-1:-3:-1])}")
    unknown = np.setdiff1d(classes, [*range(num_classes), IGNORE])
    if len(unknown):
        raise DataError(
            f"{path}: {unknown[0]} is none of {num_classes} classes, background included, nor {IGNORE}, ignored: set "
            "classes"
        )
    moved, mask = transforms(image, tv_tensors.Mask(torch.from_numpy(classes.astype(np.int64))))
    return moved.as_subclass(Tensor), mask.as_subclass(Tensor)
