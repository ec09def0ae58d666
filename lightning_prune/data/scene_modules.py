"""Data modules of the embedded scenes: segmentation and detection that need no download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from lightning_prune.data.modules import (
    DetectionDataModule,
    Objects,
    PartsDataModule,
    SegmentationDataModule,
    detection_sample,
)
from lightning_prune.data.scenes import CLASS_NAMES, Part, Scene, Scenes
from lightning_prune.data.transforms import Target, detection_evaluation, segmentation_evaluation


class ScenesDataModule(PartsDataModule):
    """Scenes of handwritten digits, rendered when they are asked for; see `Scenes`.

    Args:
        batch_size: images per batch.
        size: height and width in pixels.
        lengths: scenes for training, validation and test.
        objects: fewest and most digits per scene.
        extent: smallest and largest height of a digit as a share of ``size``.
        seed: of the scenes.
        drop_last: leave out the last, smaller training batch.
        num_workers: processes that render; 0 is right, a scene takes a millisecond.

    Raises:
        DataError: see `Scenes`.
    """

    samples: Callable[[Scenes], Dataset[Any]]

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
    ) -> None:
        super().__init__(batch_size, num_workers, drop_last)
        parts: tuple[Part, ...] = ("train", "val", "test")
        self.scenes = {
            part: Scenes(part, length, size=size, objects=objects, extent=extent, seed=seed)
            for part, length in zip(parts, lengths, strict=True)
        }

    def _load(self) -> dict[str, Dataset[Any]]:
        return {part: type(self).samples(scenes) for part, scenes in self.scenes.items()}


class _SegmentedScenes(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, scenes: Scenes) -> None:
        self.scenes = scenes
        self.transforms = segmentation_evaluation(None)

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        scene = self.scenes[index]
        image, mask = self.transforms(_image(scene), tv_tensors.Mask(torch.from_numpy(scene.mask).long()))
        return image.as_subclass(Tensor), mask.as_subclass(Tensor)


class _BoxedScenes(Dataset[tuple[Tensor, Target]]):
    def __init__(self, scenes: Scenes) -> None:
        self.scenes = scenes
        self.transforms = detection_evaluation(None)

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        scene = self.scenes[index]
        return detection_sample(_image(scene), scene_objects(scene, index), self.transforms)


class ScenesSegmentation(ScenesDataModule, SegmentationDataModule):
    """Scenes of handwritten digits with masks: background, then the digits 0..9; see `ScenesDataModule`.

    Images (N, 3, size, size), standardised by ImageNet's statistics; masks (N, size, size) int64 in 0..10.
    """

    samples = _SegmentedScenes
    num_classes = 11
    class_names = ("background", *CLASS_NAMES)


class ScenesDetection(ScenesDataModule, DetectionDataModule):
    """Scenes of handwritten digits with boxes: ten classes, 0..9; see `ScenesDataModule` and `DetectionDataModule`."""

    samples = _BoxedScenes
    num_classes = 10
    class_names = CLASS_NAMES


def scene_objects(scene: Scene, index: int) -> Objects:
    """The objects of a scene; their area is that of the pixels seen."""
    count = len(scene.labels)
    none = torch.zeros(count, dtype=torch.bool)
    area = torch.from_numpy(scene.pixels).float()
    boxes, labels = torch.from_numpy(scene.boxes), torch.from_numpy(scene.labels)
    height, width = scene.image.shape[:2]
    return Objects((height, width), boxes, labels, none, none.clone(), area, index)


def _image(scene: Scene) -> tv_tensors.Image:
    return tv_tensors.Image(torch.from_numpy(scene.image).permute(2, 0, 1).contiguous())
