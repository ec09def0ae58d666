"""CIFAR-10 with the papers' augmentation and normalisation."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.datasets import CIFAR10

from lightning_prune.data.in_memory import ImageTensors, random_crop_flip, standardised
from lightning_prune.data.modules import PartsDataModule
from lightning_prune.errors import DataError

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


class CIFAR10DataModule(PartsDataModule):
    """CIFAR-10 as (N, 3, 32, 32) images: random crop of 32 after padding by 4, horizontal flip, standardised.

    Settings of Lee et al., Sensors 23(4):2102, 2023. Their published accuracies are the best test epoch; here a
    validation part is held out of the training images instead, so that the test images choose nothing. The pixels lie
    in memory (180 MB), and a batch is transformed as a whole.

    Args:
        root: folder that holds, or will hold, ``cifar-10-batches-py``.
        batch_size: images per batch.
        download: fetch the data if they are not there.
        val_size: training images held out for validation; 0: validate on the test images, as the papers do.
        seed: of the held-out part.
        drop_last: leave out the last, smaller training batch.
        num_workers: 0 is right for data that lie in memory.

    Raises:
        DataError: missing or damaged files, naming the folder and the way out.
    """

    num_classes = 10
    normalisation = MEAN, STD
    class_names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

    def __init__(
        self,
        root: str = "data",
        batch_size: int = 128,
        *,
        download: bool = False,
        val_size: int = 5000,
        seed: int = 0,
        drop_last: bool = True,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, drop_last)
        self.root = root
        self.download = download
        self.val_size = val_size
        self.seed = seed

    def prepare_data(self) -> None:
        if self.download:
            self._files(train=True, download=True)

    def _load(self) -> dict[str, ImageTensors]:
        files = self._files(train=True)
        if not 0 <= self.val_size < len(files):
            raise DataError(f"val_size must be in [0, {len(files)}), got {self.val_size}")
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(self.seed))
        held_out, rest = (rows.sort().values for rows in (order[: self.val_size], order[self.val_size :]))
        train = _tensors(files, rest, _augmented)
        val = _tensors(files, held_out, _plain)
        files = self._files(train=False)
        test = _tensors(files, torch.arange(len(files)), _plain)
        return {"train": train, "val": val if self.val_size else test, "test": test}

    def _files(self, *, train: bool, download: bool = False) -> Any:
        try:
            return CIFAR10(self.root, train=train, download=download)
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            folder = Path(self.root).resolve() / CIFAR10.base_folder
            state = "is damaged or incomplete" if folder.exists() else "does not exist"
            raise DataError(
                f"CIFAR-10: {folder} {state} ({error}). Set download: true, or unpack cifar-10-python.tar.gz into "
                f"{Path(self.root).resolve()}"
            ) from error


def _tensors(files: Any, rows: Tensor, transforms: Callable[[Tensor], Tensor]) -> ImageTensors:
    """Images of torchvision's (N, 32, 32, 3) as (n, 3, 32, 32), and their labels."""
    images = torch.from_numpy(files.data)[rows].permute(0, 3, 1, 2).contiguous()
    return ImageTensors(images, torch.tensor(files.targets)[rows], transforms)


def _plain(images: Tensor) -> Tensor:
    return standardised(images, MEAN, STD)


def _augmented(images: Tensor) -> Tensor:
    return _plain(random_crop_flip(images))
