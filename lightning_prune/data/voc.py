"""Pascal VOC: segmentation and detection, from the original folders or one's own in their layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import ConcatDataset, Dataset
from torchvision import datasets

from lightning_prune.data.modules import DetectionDataModule, FilesDataModule, SegmentationDataModule
from lightning_prune.data.samples import BadBoxes, Samples, plain, read_detection, read_segmentation
from lightning_prune.data.transforms import (
    Augmentation,
    detection_evaluation,
    detection_training,
    segmentation_evaluation,
    segmentation_training,
)
from lightning_prune.data.voc_files import listing, read_annotation, read_classes, sbd_masks
from lightning_prune.errors import DataError

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


class VOCDataModule(FilesDataModule):
    """Image sets of ``VOCdevkit``, downloaded if asked for, or of a folder of one's own in its layout."""

    kind: Any  # torchvision's dataset that lists the files
    download: bool

    def prepare_data(self) -> None:
        if self.download:
            wanted = (*self.train_on, *self.evaluate_on, *(self.test_on or ()))
            for name in (name for name in wanted if "/" in name):  # others are one's own
                try:
                    listing(self.kind, self.root, name)
                except DataError:  # not there; torchvision would unpack 2 GB again for each that is
                    listing(self.kind, self.root, name, download=True)

    def _pairs(self, image_sets: Sequence[str]) -> list[tuple[Path, Path]]:
        return [pair for name in image_sets for pair in listing(self.kind, self.root, name)]


class VOCSegmentation(VOCDataModule, SegmentationDataModule):
    """Pascal VOC's class masks, with torchvision's reference transforms, which Lee et al. (Sensors 23(4):2102) use.

    Training images (N, 3, crop, crop): shorter side resized to 0.5 to 2 times ``base``, flipped, cropped, normalised.
    Evaluation images keep their shape at a shorter side of ``base``; a batch is padded to its largest. Masks
    (N, H, W): 0 for background, then the classes; 255, the border of objects and the padding, counts nowhere.

    Args:
        root: folder that holds, or will hold, ``VOCdevkit``; or one of your own with what ``VOC2012`` holds in it.
        batch_size: images per batch.
        train_on: image sets to train on, as "YEAR/SET", or as "SET" of a folder of your own.
        evaluate_on: image sets to validate on.
        test_on: image sets to test on, such as ("2007/test",); None: those to validate on.
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

    kind = datasets.VOCSegmentation

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 16,
        *,
        train_on: Sequence[str] = ("2012/train",),
        evaluate_on: Sequence[str] = ("2012/val",),
        test_on: Sequence[str] | None = None,
        classes: Sequence[str] = VOC_CLASSES,
        base: int = 520,
        crop: int = 480,
        sbd_root: str | None = None,
        download: bool = False,
        drop_last: bool = True,
        num_workers: int = 2,
    ) -> None:
        super().__init__(root, train_on, evaluate_on, test_on, batch_size, num_workers, drop_last)
        self.class_names = ("background", *classes)
        self.num_classes = len(self.class_names)
        self.sbd_root = sbd_root
        self.download = download
        self.training = segmentation_training(base, crop)
        self.evaluation = segmentation_evaluation(base)

    def _part(self, image_sets: Sequence[str], transforms: Callable[..., Any], *, train: bool) -> Dataset[Any]:
        load = partial(read_segmentation, read_classes=read_classes, transforms=transforms)
        samples = Samples(self._pairs(image_sets), partial(load, num_classes=self.num_classes))
        if not train or self.sbd_root is None:
            return samples
        return ConcatDataset([samples, sbd_masks(self.sbd_root, len(VOC_CLASSES) + 1, transforms)])


class VOCDetection(VOCDataModule, DetectionDataModule):
    """Pascal VOC's boxes, letterboxed; targets as in `DetectionDataModule`, labels in the order of ``classes``.

    Objects marked difficult are evaluated with their flag and not trained on. Images without an object stay, as
    negatives. All annotations are read and checked before training starts.

    Args:
        root: folder that holds, or will hold, ``VOCdevkit``; or one of your own with what ``VOC2012`` holds in it.
        batch_size: images per batch.
        train_on: image sets to train on, as "YEAR/SET", or as "SET" of a folder of your own; ("2007/trainval",
            "2012/trainval") is the usual large one.
        evaluate_on: image sets to validate on.
        test_on: image sets to test on, such as ("2007/test",); None: those to validate on.
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

    kind = datasets.VOCDetection

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 16,
        *,
        train_on: Sequence[str] = ("2012/train",),
        evaluate_on: Sequence[str] = ("2012/val",),
        test_on: Sequence[str] | None = None,
        classes: Sequence[str] = VOC_CLASSES,
        size: int | None = 416,
        augment: Augmentation = "yolo",
        bad_boxes: BadBoxes = "refuse",
        download: bool = False,
        drop_last: bool = True,
        num_workers: int = 2,
    ) -> None:
        super().__init__(root, train_on, evaluate_on, test_on, batch_size, num_workers, drop_last)
        self.class_names = tuple(classes)
        self.num_classes = len(self.class_names)
        self.bad_boxes = bad_boxes
        self.download = download
        self.training = detection_training(augment, size)
        self.evaluation = detection_evaluation(size)

    def _part(self, image_sets: Sequence[str], transforms: Callable[..., Any], *, train: bool) -> Samples:
        items = []
        for number, (image, annotation) in enumerate(self._pairs(image_sets)):
            target = read_annotation(annotation, self.class_names, number, self.bad_boxes)
            items.append((image, plain(target) if train else target))
        return Samples(items, partial(read_detection, transforms=transforms))
