"""CIFAR-10 with the papers' augmentation and normalisation."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision.datasets import CIFAR10
from torchvision.transforms import v2

from lightning_prune.data.modules import PartsDataModule
from lightning_prune.errors import DataError

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


class CIFAR10DataModule(PartsDataModule):
    """CIFAR-10 as (N, 3, 32, 32) images: random crop of 32 after padding by 4, horizontal flip, standardised.

    Settings of Lee et al., Sensors 23(4):2102, 2023. Their published accuracies are the best test epoch; here a
    validation part is held out of the training images instead, so that the test images choose nothing.

    Args:
        root: folder that holds, or will hold, ``cifar-10-batches-py``.
        batch_size: images per batch.
        download: fetch the data if they are not there.
        val_size: training images held out for validation; 0: validate on the test images, as the papers do.
        seed: of the held-out part.
        drop_last: leave out the last, smaller training batch.
        num_workers: processes that load.

    Raises:
        DataError: missing or damaged files, naming the folder and the way out.
    """

    num_classes = 10
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
        num_workers: int = 2,
    ) -> None:
        super().__init__(batch_size, num_workers, drop_last)
        self.root = root
        self.download = download
        self.val_size = val_size
        self.seed = seed

    def prepare_data(self) -> None:
        if self.download:
            self._files(train=True, transform=None, download=True)

    def _load(self) -> dict[str, Dataset[Any]]:
        to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        augmented = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), *to_tensor])
        plain = v2.Compose(to_tensor)
        train = self._files(train=True, transform=augmented)
        test = self._files(train=False, transform=plain)
        if not 0 <= self.val_size < len(train):
            raise DataError(f"val_size must be in [0, {len(train)}), got {self.val_size}")
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(self.seed)).tolist()
        held_out, rest = order[: self.val_size], order[self.val_size :]
        unaugmented = copy.copy(train)  # the same 150 MB of pixels
        unaugmented.transform = plain
        return {
            "train": Subset(train, sorted(rest)),
            "val": Subset(unaugmented, sorted(held_out)) if held_out else test,
            "test": test,
        }

    def _files(self, *, train: bool, transform: Callable[[Any], Tensor] | None, download: bool = False) -> Any:
        try:
            return CIFAR10(self.root, train=train, transform=transform, download=download)
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            folder = Path(self.root).resolve() / CIFAR10.base_folder
            state = "is damaged or incomplete" if folder.exists() else "does not exist"
            raise DataError(
                f"CIFAR-10: {folder} {state} ({error}). Set download: true, or unpack cifar-10-python.tar.gz into "
                f"{Path(self.root).resolve()}"
            ) from error
