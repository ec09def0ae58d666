"""Data modules of scenes: segmentation and detection without a download."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as transform

from lightning_prune.data.in_memory import KeptSamples, standardised, whole_batch
from lightning_prune.data.modules import DetectionDataModule, PartsDataModule, SegmentationDataModule
from lightning_prune.data.samples import Target, target_of
from lightning_prune.data.scenes import CLASS_NAMES, PARTS, Scene, Scenes
from lightning_prune.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from lightning_prune.errors import DataError


class ScenesDataModule(PartsDataModule):
    """Scenes of handwritten digits, rendered when they are first asked for and then kept; see `Scenes`.

    Args:
        batch_size: images per batch.
        size: height and width in pixels.
        lengths: scenes for training, validation and test.
        objects: fewest and most digits per scene.
        extent: smallest and largest height of a digit as a share of ``size``.
        seed: of the scenes.
        drop_last: leave out the last, smaller training batch.
        num_workers: processes that load, each of which renders and keeps scenes of its own; 0 is right.
        cache: MiB of rendered scenes that are kept, at four bytes a pixel; those beyond are rendered every time.

    Raises:
        DataError: see `Scenes`; or a negative cache.
    """

    collate = staticmethod(whole_batch)

    def __init__(
        self,
        batch_size: int = 16,
        *,
        size: int = 128,
        lengths: tuple[int, int, int] = (2000, 200, 400),
        objects: tuple[int, int] = (1, 5),
        extent: tuple[float, float] = (0.2, 0.45),
        seed: int = 0,
        drop_last: bool = False,
        num_workers: int = 0,
        cache: int = 1024,
    ) -> None:
        super().__init__(batch_size, num_workers, drop_last)
        if cache < 0:
            raise DataError(f"cache must be at least 0 MiB, got {cache}")
        self.scenes = {
            part: Scenes(part, length, size=size, objects=objects, extent=extent, seed=seed)
            for part, length in zip(PARTS, lengths, strict=True)
        }
        self.kept = min(1.0, cache * 2**20 / (4 * size**2 * sum(lengths)))  # share of every part

    def _load(self) -> dict[str, KeptSamples]:
        return {
            part: KeptSamples(len(scenes), int(self.kept * len(scenes)), partial(self.sample, scenes), self.batch)
            for part, scenes in self.scenes.items()
        }

    @staticmethod
    @abstractmethod
    def sample(scenes: Scenes, index: int) -> tuple[Tensor, Any]:
        """Image (3, size, size) uint8 and what is to be learnt of one scene."""

    @staticmethod
    @abstractmethod
    def batch(samples: list[tuple[Tensor, Any]]) -> tuple[Tensor, Any]:
        """The batch that a network is given."""


class ScenesSegmentation(ScenesDataModule, SegmentationDataModule):
    """Scenes of handwritten digits with masks: background, then the digits 0..9; see `ScenesDataModule`.

    Images (N, 3, size, size), standardised by ImageNet's statistics; masks (N, size, size) int64 in 0..10.
    """

    num_classes = 11
    class_names = ("background", *CLASS_NAMES)

    @staticmethod
    def sample(scenes: Scenes, index: int) -> tuple[Tensor, Tensor]:
        scene = scenes[index]
        return _pixels(scene), torch.from_numpy(scene.mask)

    @staticmethod
    def batch(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        images, masks = (torch.stack(tensors) for tensors in zip(*samples, strict=True))
        return standardised(images, IMAGENET_MEAN, IMAGENET_STD), masks.long()


class ScenesDetection(ScenesDataModule, DetectionDataModule):
    """Scenes of handwritten digits with boxes: ten classes, 0..9; see `ScenesDataModule` and `DetectionDataModule`.

    The area of an object is that of its pixels seen.
    """

    num_classes = 10
    class_names = CLASS_NAMES

    @staticmethod
    def sample(scenes: Scenes, index: int) -> tuple[Tensor, Target]:
        scene = scenes[index]
        return _pixels(scene), target_of(scene.mask.shape, scene.boxes, scene.labels, index, area=scene.pixels)

    @staticmethod
    def batch(samples: list[tuple[Tensor, Target]]) -> tuple[Tensor, list[Target]]:
        images = torch.stack([image for image, _ in samples])
        return transform.to_dtype(images, torch.float32, scale=True), [_own(target) for _, target in samples]


def _pixels(scene: Scene) -> Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(scene.image).permute(2, 0, 1).contiguous()


def _own(target: Target) -> Target:
    """New tensors: steps may work in place."""
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in target.items()}
