"""Data modules of the embedded scenes: segmentation and detection that need no download."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as transform

from lightning_prune.data.modules import DetectionDataModule, PartsDataModule, SegmentationDataModule
from lightning_prune.data.samples import Samples, Target, detection_sample, segmentation_sample, target_of
from lightning_prune.data.scenes import CLASS_NAMES, PARTS, Scenes
from lightning_prune.data.transforms import detection_evaluation, segmentation_evaluation


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
        self.scenes = {
            part: Scenes(part, length, size=size, objects=objects, extent=extent, seed=seed)
            for part, length in zip(PARTS, lengths, strict=True)
        }

    def _load(self) -> dict[str, Dataset[Any]]:
        return {part: Samples(range(len(scenes)), partial(self.sample, scenes)) for part, scenes in self.scenes.items()}

    @staticmethod
    @abstractmethod
    def sample(scenes: Scenes, index: int) -> Any:
        """Image and what is to be learnt of one scene."""


class ScenesSegmentation(ScenesDataModule, SegmentationDataModule):
    """Scenes of handwritten digits with masks: background, then the digits 0..9; see `ScenesDataModule`.

    Images (N, 3, size, size), standardised by ImageNet's statistics; masks (N, size, size) int64 in 0..10.
    """

    num_classes = 11
    class_names = ("background", *CLASS_NAMES)

    @staticmethod
    def sample(scenes: Scenes, index: int) -> tuple[Tensor, Tensor]:
        scene = scenes[index]
        return segmentation_sample(transform.to_image(scene.image), scene.mask, segmentation_evaluation(None))


class ScenesDetection(ScenesDataModule, DetectionDataModule):
    """Scenes of handwritten digits with boxes: ten classes, 0..9; see `ScenesDataModule` and `DetectionDataModule`.

    The area of an object is that of its pixels seen.
    """

    num_classes = 10
    class_names = CLASS_NAMES

    @staticmethod
    def sample(scenes: Scenes, index: int) -> tuple[Tensor, Target]:
        scene = scenes[index]
        target = target_of(scene.mask.shape, scene.boxes, scene.labels, index, area=scene.pixels)
        return detection_sample(transform.to_image(scene.image), target, detection_evaluation(None))
