"""Segmentation of one's own images: a folder of images and one of masks for each part."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lightning_prune.data.folder_listing import PARTS, images_by_stem
from lightning_prune.data.in_memory import KEPT_BYTES
from lightning_prune.data.modules import SegmentationDataModule
from lightning_prune.data.samples import Samples, image_size, read_masked, read_segmentation, segmentation_sample
from lightning_prune.data.transforms import IGNORE, segmentation_evaluation, segmentation_training
from lightning_prune.data.voc_files import read_classes
from lightning_prune.errors import DataError

Pairs = list[tuple[Path, Path]]


class FolderSegmentation(SegmentationDataModule):
    """Images with masks of class numbers, in two folders for each part, as CamVid comes.

    ``train/0001.png`` has its mask in ``trainannot/0001.png``: the names without ending are the same. Masks are 8-bit
    files, grey or with a palette, of their image's size. The transforms are those of `VOCSegmentation`, torchvision's
    reference. Training images (N, 3, crop, crop): shorter side resized to 0.5 to 2 times ``base``, flipped, cropped,
    normalised. Evaluation images keep their shape at a shorter side of ``base``; a batch is padded to its largest.
    Masks (N, H, W): the class numbers; 255, ``ignore_label`` and the padding, counts nowhere.

    Args:
        root: folder of the folders.
        batch_size: images per batch.
        classes: names of the classes in the order of their numbers from 0, background included if there is one.
        folders: {"train": (images, masks), "val": ..., "test": ...}, relative to ``root``; where one of val and test is
            missing, the other takes its place. Default: CamVid's, ``train`` and ``trainannot``, and so on.
        ignore_label: the masks' number where no class is asked for, CamVid's 11; None: every pixel has a class.
        base: shorter side of evaluation images in pixels; training images vary around it.
        crop: side of training images in pixels, or their height and width.
        in_memory: whether images and masks lie in memory decoded; default: if they take less than 1 GiB.
        drop_last: leave out the last, smaller training batch.
        num_workers: processes that transform, and decode what does not lie in memory.

    Attributes:
        class_names: in the order of their numbers.
        num_classes: how many there are.

    Raises:
        DataError: settings without meaning; in `setup` a folder that is missing or holds no image, an image without
            mask or a mask without image, or a mask of another size; then or while loading a file that cannot be read, a
            mask of colours, or one with a number that is no class. All name the file or folder.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for name, mode, value in (("images", "RGB", (90, 9, 9)), ("masks", "L", 1)):
        ...         Path(root, name).mkdir()
        ...         for number in range(2):
        ...             Image.new(mode, (40, 32), value).save(Path(root, name, f"{number}.png"))
        ...     folders = {part: ("images", "masks") for part in ("train", "val")}
        ...     settings = {"base": 32, "crop": 24, "num_workers": 0}
        ...     data = FolderSegmentation(root, 2, classes=("road", "sky"), folders=folders, **settings)
        ...     data.setup()
        ...     images, masks = next(iter(data.val_dataloader()))
        ...     images.shape, masks.shape, masks.unique().tolist()
        (torch.Size([2, 3, 32, 40]), torch.Size([2, 32, 40]), [1])
    """

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 16,
        *,
        classes: Sequence[str],
        folders: Mapping[str, tuple[str, str]] | None = None,
        ignore_label: int | None = None,
        base: int = 520,
        crop: int | tuple[int, int] = 480,
        in_memory: bool | None = None,
        drop_last: bool = True,
        num_workers: int = 2,
    ) -> None:
        super().__init__(batch_size, num_workers, drop_last)
        self.class_names = tuple(classes)
        self.num_classes = len(self.class_names)
        if not 0 < self.num_classes <= IGNORE:
            raise DataError(f"classes must be 1 to {IGNORE} names, got {self.num_classes}")
        if ignore_label is not None and not self.num_classes <= ignore_label <= 255:
            raise DataError(
                f"ignore_label is {ignore_label}, but must be a number that is no class, {self.num_classes} to 255"
            )
        if folders is not None and not {"train"} < {*folders} <= {*PARTS}:
            raise DataError(f"folders needs train, and val or test or both, got {', '.join(folders) or 'nothing'}")
        self.root = root
        self.folders = folders
        self.ignore_label = ignore_label
        self.in_memory = in_memory
        self.training = segmentation_training(base, crop)
        self.evaluation = segmentation_evaluation(base)

    def _load(self) -> dict[str, Samples]:
        root = Path(self.root)
        folders = self.folders or _camvid(root)
        pairs = {part: _pairs(root / images, root / masks) for part, (images, masks) in folders.items()}
        kept = self.in_memory
        if kept is None:
            kept = sum(4 * math.prod(image_size(image)) for of in pairs.values() for image, _ in of) < KEPT_BYTES
        parts = {
            part: self._samples(of, self.training if part == "train" else self.evaluation, kept)
            for part, of in pairs.items()
        }
        evaluated = parts.get("val") or parts["test"]
        return {"train": parts["train"], "val": evaluated, "test": parts.get("test", evaluated)}

    def _samples(self, pairs: Pairs, transforms: Callable[..., Any], kept: bool) -> Samples:
        known: dict[str, Any] = {"read_classes": self._read_classes, "num_classes": self.num_classes}
        if not kept:
            return Samples(pairs, partial(read_segmentation, transforms=transforms, **known))
        return Samples([read_masked(pair, **known) for pair in pairs], partial(_transformed, transforms=transforms))

    def _read_classes(self, path: Path) -> np.ndarray:
        """The class numbers (H, W) of a mask, 255 where it has ``ignore_label``."""
        classes, ignored = read_classes(path), self.ignore_label
        unknown = np.setdiff1d(classes, [*range(self.num_classes), *([] if ignored is None else [ignored])])
        if len(unknown):
            raise DataError(
                f"{path}: {unknown[0]} is none of {self.num_classes} classes, 0 to {self.num_classes - 1}"
                f"{'' if ignored is None else f', nor ignore_label, {ignored}'}: add it to classes, or set "
                "ignore_label to it if no class is asked for there"
            )
        return classes if ignored is None else np.where(classes == ignored, IGNORE, classes).astype(np.uint8)


def _transformed(pair: tuple[Any, np.ndarray], transforms: Callable[..., Any]) -> tuple[Any, Any]:
    return segmentation_sample(*pair, transforms)


def _camvid(root: Path) -> dict[str, tuple[str, str]]:
    """CamVid's folders, of which val or test may be missing."""
    found = {part: (part, f"{part}annot") for part in PARTS if (root / part).is_dir()}
    if not {"train"} < {*found}:
        raise DataError(
            f"{root.absolute()} holds no {' and '.join(part for part in PARTS[:2] if part not in found)}: put images "
            "into train and val, their masks into trainannot and valannot, or name folders"
        )
    return found


def _pairs(images: Path, masks: Path) -> Pairs:
    """Each image with its mask, of the same name and size."""
    files, theirs = images_by_stem(images), images_by_stem(masks)
    if not files:
        raise DataError(f"the folder {images.absolute()} holds no image")
    for of, other, folder in ((files, theirs, masks), (theirs, files, images)):
        if lone := [path for stem, path in of.items() if stem not in other]:
            raise DataError(
                f"{lone[0]} has no file of that name beside it in {folder.absolute()} ({len(lone)} of {len(of)} have "
                "none): add what is missing, or take out what is not meant"
            )
    if lossy := [path for path in theirs.values() if path.suffix.lower() in (".jpg", ".jpeg")]:
        raise DataError(f"{lossy[0]} is a JPEG, which changes numbers: masks must be PNGs or other files without loss")
    pairs = [(path, theirs[stem]) for stem, path in files.items()]
    for image, mask in pairs:
        if (size := image_size(mask)) != (expected := image_size(image)):
            raise DataError(f"{mask} is {size[1]} x {size[0]}, but its image is {expected[1]} x {expected[0]}")
    return pairs
