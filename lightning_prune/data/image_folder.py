"""Classification of one's own images: a folder for each class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as transform

from lightning_prune.data.cifar10 import MEAN as CIFAR10_MEAN
from lightning_prune.data.cifar10 import STD as CIFAR10_STD
from lightning_prune.data.folder_listing import Files, class_names, listed_parts
from lightning_prune.data.in_memory import KEPT_BYTES, ImageTensors, WholeBatches, random_crop_flip, standardised
from lightning_prune.data.modules import PartsDataModule
from lightning_prune.data.samples import read_image
from lightning_prune.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from lightning_prune.errors import DataError, check_choice

FolderAugmentation = Literal["none", "crop_flip", "resized_crop"]
Normalisation = Literal["imagenet", "cifar10", "none"]
STATISTICS = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "cifar10": (CIFAR10_MEAN, CIFAR10_STD),
    "none": ((0.0,) * 3, (1.0,) * 3),
}


class ImageFolderDataModule(PartsDataModule):
    """Images of any size in a folder for each class, as batches (N, 3, H, W), standardised, and labels (N,).

    The folder ``root`` holds either the parts ``train`` and ``val``, ``test`` or both, each with the same folders of
    classes (ImageNet's layout; where one of the two is missing, the other takes its place), or the folders of classes
    themselves, of which ``val_share`` holds some images out or ``lists`` says which image belongs where. The classes
    are numbered in alphabetical order.

    Small images lie in memory, and a batch is transformed as a whole; others are decoded when they are asked for, in
    worker processes.

    Args:
        root: the folder.
        batch_size: images per batch.
        size: height and width of what the network sees, in pixels.
        augment: of training images. ``crop_flip``: cropped at random after padding by ``size // 8``, and flipped (He et
            al., CVPR 2016, on CIFAR-10); ``resized_crop``: ImageNet's recipe, a crop at random of 8 to 100% of the
            area, resized, and flipped (Szegedy et al., CVPR 2015); ``none``.
        resize: shorter side of images before the square in their middle is cut out of them, for all but
            ``resized_crop``'s training images. Default: ``size``; under ``resized_crop`` ``size / 0.875``, as 256 is
            to 224.
        normalisation: whose mean and standard deviation of pixels in [0, 1] to standardise by; ``none`` leaves them in
            [0, 1].
        mean, std: three numbers each, instead of those that ``normalisation`` names.
        val_share: share of the training images of each class to hold out for validation; a ``val`` that is there is
            tested on then, unless there is a ``test``.
        lists: {"train": path, "val": path, "test": path} of text files that name an image on each line, relative to
            ``root``, such as ``cat/001.jpg``.
        seed: of the images that are held out.
        in_memory: whether the pixels lie in memory; default: if they take less than 1 GiB, and never under
            ``resized_crop``, which needs images as they are.
        drop_last: leave out the last, smaller training batch.
        num_workers: processes that decode images that do not lie in memory.

    Attributes:
        class_names: in the order of their numbers.
        num_classes: how many there are.

    Raises:
        DataError: settings without meaning; in `setup` a folder that is missing, a class without images, parts with
            different classes, a list that names what is not there or an image twice; and, then or while loading, an
            image that cannot be read. All name the file or folder.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for number, name in enumerate(("cat", "cat", "dog", "dog")):
        ...         Path(root, name).mkdir(exist_ok=True)
        ...         Image.new("RGB", (40, 32), (90 * number, 9, 9)).save(Path(root, name, f"{number}.png"))
        ...     data = ImageFolderDataModule(root, batch_size=2, size=32, val_share=0.5)
        ...     data.setup()
        ...     images, labels = next(iter(data.val_dataloader()))
        ...     data.class_names, images.shape, labels.tolist()
        (('cat', 'dog'), torch.Size([2, 3, 32, 32]), [0, 1])
    """

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 128,
        *,
        size: int = 32,
        augment: FolderAugmentation = "crop_flip",
        resize: int | None = None,
        normalisation: Normalisation = "imagenet",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        val_share: float = 0.0,
        lists: Mapping[str, str] | None = None,
        seed: int = 0,
        in_memory: bool | None = None,
        drop_last: bool = True,
        num_workers: int = 2,
    ) -> None:
        super().__init__(batch_size, num_workers, drop_last)
        check_choice("augment", augment, FolderAugmentation, DataError)
        check_choice("normalisation", normalisation, Normalisation, DataError)
        default = STATISTICS[normalisation]
        self.mean, self.std = tuple(mean or default[0]), tuple(std or default[1])
        self.normalisation = self.mean, self.std  # for exported files
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise DataError(f"mean and std need three numbers each, std above 0, got {self.mean} and {self.std}")
        self.resize = resize or (round(size / 0.875) if augment == "resized_crop" else size)
        if size < 1 or self.resize < size:
            raise DataError(f"size must be at least 1 and resize at least size, got {size} and {self.resize}")
        if in_memory and augment == "resized_crop":
            raise DataError(
                "augment='resized_crop' crops images as they are, which do not lie in memory: leave in_memory out"
            )
        self.root = root
        self.size = size
        self.augment = augment
        self.val_share = val_share
        self.lists = lists
        self.seed = seed
        self.in_memory = in_memory

    @property
    def class_names(self) -> tuple[str, ...]:
        return class_names(Path(self.root))

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def _load(self) -> dict[str, WholeBatches]:
        files = listed_parts(Path(self.root), self.val_share, self.lists, self.seed)
        plain = partial(standardised, mean=self.mean, std=self.std)
        augmented = plain
        if self.augment == "crop_flip":
            augmented = partial(_augmented, padding=self.size // 8, plain=plain)
        middle = partial(_middle, resize=self.resize, size=self.size)
        resized = v2.Compose([v2.RandomResizedCrop(self.size, antialias=True), v2.RandomHorizontalFlip()])
        kept = self._in_memory(files)
        parts: dict[str, WholeBatches] = {}
        for name, of in files.items():
            twin = next((part for part in parts if name != "train" and files[part] is of), None)
            one = resized if name == "train" and self.augment == "resized_crop" else middle
            batch = augmented if name == "train" else plain
            if twin is not None:
                parts[name] = parts[twin]
            elif kept:
                parts[name] = _in_tensors(of, one, batch, self.size)
            else:
                parts[name] = ImageFiles(of, one, batch)
        if kept:
            self.num_workers = 0  # a batch takes less time than its way out of another process
        return parts

    def _in_memory(self, files: Mapping[str, Files]) -> bool:
        if self.in_memory is not None or self.augment == "resized_crop":
            return bool(self.in_memory)
        return sum(map(len, files.values())) * 3 * self.size**2 < KEPT_BYTES


class ImageFiles(WholeBatches):
    """Images that are read when they are asked for: ``one`` makes (3, H, W) uint8 of each, ``batch`` ends a batch."""

    def __init__(self, files: Files, one: Callable[[Tensor], Tensor], batch: Callable[[Tensor], Tensor]) -> None:
        self.files, self.one, self.batch = files, one, batch

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        files = [self.files[index] for index in indices]
        images = torch.stack([self.one(read_image(file.path).as_subclass(Tensor)) for file in files])
        return self.batch(images), torch.tensor([file.label for file in files])


def _in_tensors(
    files: Files, one: Callable[[Tensor], Tensor], batch: Callable[[Tensor], Tensor], size: int
) -> ImageTensors:
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    for place, file in zip(images, files, strict=True):
        image = read_image(file.path).as_subclass(Tensor)
        place.copy_(one(image))
    return ImageTensors(images, torch.tensor([file.label for file in files]), batch)


def _middle(image: Tensor, resize: int, size: int) -> Tensor:
    """The square of ``size`` in the middle of an image (3, H, W) whose shorter side becomes ``resize`` pixels."""
    if min(image.shape[1:]) != resize:
        image = transform.resize(image, [resize], antialias=True)
    return image if image.shape[1:] == (size, size) else transform.center_crop(image, [size, size])


def _augmented(images: Tensor, padding: int, plain: Callable[[Tensor], Tensor]) -> Tensor:
    return plain(random_crop_flip(images, padding))
