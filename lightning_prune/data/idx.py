"""MNIST, and what comes in its files: EMNIST, Fashion-MNIST, Kuzushiji-MNIST."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_prune.data.folder_listing import held_out
from lightning_prune.data.idx_files import find_idx, read_idx
from lightning_prune.data.in_memory import ImageTensors, random_shift, standardised
from lightning_prune.data.modules import PartsDataModule
from lightning_prune.errors import DataError

DIGITS = tuple("0123456789")
NAMES = {"train": ("train",), "test": ("t10k", "test")}  # EMNIST's are called test


class IDXDataModule(PartsDataModule):
    """Images (N, 1, H, W) in grey, standardised, and labels (N,), from MNIST's four files, packed by gzip or not.

    ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, and the same with ``t10k`` or ``test``, as EMNIST calls
    them. The pixels lie in memory, and a batch is transformed as a whole. Nothing of a file is ever executed, and none
    is read beyond what its header promises.

    Args:
        root: folder of the files.
        batch_size: images per batch.
        prefix: what stands before their names, such as ``emnist-letters-``.
        classes: names of the classes, in the order of their numbers.
        first_label: the number of the first class in the files; 1 in EMNIST's letters.
        transposed: the files hold rows for columns, as EMNIST's do.
        padding: pixels of black around every image; 2 makes 28 x 28 the 32 x 32 that LeNet takes.
        mean, std: of pixels in [0, 1], to standardise by; the defaults are MNIST's.
        shift: training images are moved by up to so many pixels at random, down and across.
        val_share: share of the training images of each class to hold out for validation; 0: validate on the test
            images.
        seed: of the images that are held out.
        drop_last: leave out the last, smaller training batch.
        num_workers: 0 is right for data that lie in memory.

    Attributes:
        class_names: in the order of their numbers.
        num_classes: how many there are.

    Raises:
        DataError: settings without meaning; in `setup` a file that is missing, no IDX file, damaged, shorter or longer
            than its header says, another number of labels than of images, or a label that is none of the classes.
            All name the file and what was seen.

    Example:
        >>> import struct, tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for part in ("train", "t10k"):
        ...         header = struct.pack(">4I", 0x803, 4, 28, 28)
        ...         _ = Path(root, f"{part}-images-idx3-ubyte").write_bytes(header + bytes(4 * 28 * 28))
        ...         header = struct.pack(">2I", 0x801, 4)
        ...         _ = Path(root, f"{part}-labels-idx1-ubyte").write_bytes(header + bytes([0, 1, 0, 1]))
        ...     data = IDXDataModule(root, batch_size=2, classes=("no", "yes"), padding=2, val_share=0.5)
        ...     data.setup()
        ...     images, labels = next(iter(data.test_dataloader()))
        ...     images.shape, labels.tolist(), len(data.parts["val"])
        (torch.Size([2, 1, 32, 32]), [0, 1], 2)
    """

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 128,
        *,
        prefix: str = "",
        classes: Sequence[str] = DIGITS,
        first_label: int = 0,
        transposed: bool = False,
        padding: int = 0,
        mean: float = 0.1307,
        std: float = 0.3081,
        shift: int = 0,
        val_share: float = 0.1,
        seed: int = 0,
        drop_last: bool = True,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, drop_last)
        if padding < 0 or shift < 0 or std <= 0:
            raise DataError(f"padding and shift must be at least 0, std above 0, got {padding}, {shift} and {std}")
        if not 0 <= val_share < 1:
            raise DataError(f"val_share must be in [0, 1), got {val_share}")
        self.root = root
        self.prefix = prefix
        self.class_names = tuple(classes)
        self.num_classes = len(self.class_names)
        self.first_label = first_label
        self.transposed = transposed
        self.padding = padding
        self.mean, self.std = (mean,), (std,)
        self.normalisation = self.mean, self.std
        self.shift = shift
        self.val_share = val_share
        self.seed = seed

    def _load(self) -> dict[str, ImageTensors]:
        plain = partial(standardised, mean=self.mean, std=self.std)
        images, labels = self._read("train")
        rest, held = list(range(len(labels))), list[int]()
        if self.val_share:
            rest, held = held_out(labels.tolist(), self.class_names, self.val_share, self.seed)
        train = ImageTensors(images[rest], labels[rest], partial(_shifted, pixels=self.shift, plain=plain))
        test = ImageTensors(*self._read("test"), plain)
        if train.tensors[0].shape[1:] != test.tensors[0].shape[1:]:
            sizes = " and ".join(f"{x.shape[3]} x {x.shape[2]}" for x in (train.tensors[0], test.tensors[0]))
            raise DataError(f"{self.root}: the images of train and test differ in size: {sizes}")
        val = ImageTensors(images[held], labels[held], plain) if held else test
        return {"train": train, "val": val, "test": test}

    def _read(self, part: str) -> tuple[Tensor, Tensor]:
        """The images (N, 1, H, W) uint8 and labels (N,) of one part."""
        names = tuple(self.prefix + name for name in NAMES[part])
        files = [find_idx(Path(self.root), names, kind, axes) for kind, axes in (("images", 3), ("labels", 1))]
        pixels, numbers = (read_idx(file, axes) for file, axes in zip(files, (3, 1), strict=True))
        if len(pixels) != len(numbers):
            raise DataError(f"{files[0]} has {len(pixels)} images, but {files[1]} has {len(numbers)} labels")
        labels = numbers.astype(np.int64) - self.first_label
        strange = np.flatnonzero((labels < 0) | (labels >= self.num_classes))
        if len(strange):
            raise DataError(
                f"{files[1]}: label {strange[0] + 1} of {len(labels)} is {numbers[strange[0]]}, but the "
                f"{self.num_classes} classes have {self.first_label} to {self.first_label + self.num_classes - 1}: set "
                "classes, or first_label"
            )
        images = torch.from_numpy(pixels.swapaxes(1, 2) if self.transposed else pixels)[:, None]
        return F.pad(images, (self.padding,) * 4).contiguous(), torch.from_numpy(labels)


def _shifted(images: Tensor, pixels: int, plain: Callable[[Tensor], Tensor]) -> Tensor:
    return plain(random_shift(images, pixels) if pixels else images)
