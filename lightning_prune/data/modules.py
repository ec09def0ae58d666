"""What the data modules share: parts, loaders and batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_prune.data.in_memory import whole_batch
from lightning_prune.data.samples import Target
from lightning_prune.data.transforms import IGNORE, IMAGENET_MEAN, IMAGENET_STD
from lightning_prune.errors import DataError


def at_least(least: int, **values: int) -> None:
    """Refuse settings that are less."""
    for name, value in values.items():
        if value < least:
            raise DataError(f"{name} must be at least {least}, got {value}")


class PartsDataModule(LightningDataModule, ABC):
    """A data module of the parts "train", "val" and "test", which are loaded when they are first needed."""

    collate: Callable[[Any], Any] = staticmethod(whole_batch)  # makes a batch of samples
    normalisation: tuple[Sequence[float], Sequence[float]] | None = None  # mean and deviation of pixels in [0, 1]

    def __init__(self, batch_size: int, num_workers: int, drop_last: bool) -> None:
        super().__init__()
        at_least(1, batch_size=batch_size)
        at_least(0, num_workers=num_workers)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.drop_last = drop_last
        self.parts: dict[str, Any] = {}

    @abstractmethod
    def _load(self) -> dict[str, Any]:
        """The parts "train", "val" and "test"."""

    @final
    def setup(self, stage: str | None = None) -> None:
        if not self.parts:
            parts = self._load()
            if empty := [name for name, part in parts.items() if not len(part)]:
                raise DataError(f"{type(self).__name__}: the {empty[0]} part holds no image")
            self.parts = parts

    def train_dataloader(self) -> DataLoader[Any]:
        count = len(self.parts["train"])
        if self.drop_last and count < self.batch_size:
            raise DataError(
                f"{type(self).__name__}: {count} training images are less than one batch of {self.batch_size}, and "
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


class FilesDataModule(PartsDataModule):
    """Image sets in files: what is trained on, validated on, and tested on if that is something else."""

    training: Callable[..., Any]  # transforms of training samples
    evaluation: Callable[..., Any]  # and of the others

    def __init__(
        self,
        root: str,
        train_on: Any,
        evaluate_on: Any,
        test_on: Any,
        batch_size: int,
        num_workers: int,
        drop_last: bool,
    ) -> None:
        super().__init__(batch_size, num_workers, drop_last)
        self.root = root
        self.train_on = train_on
        self.evaluate_on = evaluate_on
        self.test_on = test_on

    def _load(self) -> dict[str, Any]:
        train = self._part(self.train_on, self.training, train=True)
        val = self._part(self.evaluate_on, self.evaluation, train=False)
        test = val if self.test_on is None else self._part(self.test_on, self.evaluation, train=False)
        return {"train": train, "val": val, "test": test}

    @abstractmethod
    def _part(self, image_sets: Any, transforms: Callable[..., Any], *, train: bool) -> Dataset[Any]:
        """The samples of the image sets."""


SegmentationBatch = tuple[Tensor, Tensor]


def segmentation_batch(samples: list[SegmentationBatch]) -> SegmentationBatch:
    """(images, masks), padded right and below to the largest: 0 in images, 255, ignored, in masks."""
    height, width = (max(mask.shape[side] for _, mask in samples) for side in (0, 1))
    images, masks = (
        torch.stack([F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2]), value=value) for x in of])
        for of, value in zip(zip(*samples, strict=True), (0, IGNORE), strict=True)
    )
    return images, masks


class SegmentationDataModule(PartsDataModule):
    """Batches of images (N, 3, H, W), standardised, and masks (N, H, W) int64, 255 where nothing is asked for."""

    collate = staticmethod(segmentation_batch)
    normalisation = IMAGENET_MEAN, IMAGENET_STD


def detection_batch(samples: list[tuple[Tensor, Target]]) -> tuple[Tensor | list[Tensor], list[Target]]:
    """(images, targets); images are stacked where they are of one size, else a list."""
    images = [image for image, _ in samples]
    same = all(image.shape == images[0].shape for image in images)
    return torch.stack(images) if same else images, [target for _, target in samples]


class DetectionDataModule(PartsDataModule):
    """Batches of images in [0, 1], (N, 3, H, W) or a list of (3, H, W), and a list of targets.

    A target holds ``boxes`` (n, 4) x1 y1 x2 y2 in pixels, ``labels`` (n,) from 0, ``difficult`` and ``iscrowd`` (n,)
    bool, ``area`` (n,), ``image_id`` and ``orig_size`` (height, width).
    """

    collate = staticmethod(detection_batch)
