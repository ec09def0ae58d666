"""scikit-learn's handwritten digits: 1,797 real scans that need no download."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_prune.data.in_memory import ImageTensors
from lightning_prune.data.modules import PartsDataModule, at_least


class DigitsDataModule(PartsDataModule):
    """Handwritten digits (Alpaydin and Kaynak, UCI 1998) as (N, 3, 32, 32) images and labels 0..9.

    The 8x8 scans are resized bilinearly and repeated over three channels, so that networks for CIFAR-10 take them.
    70 / 10 / 20 percent are for training, validation and test, stratified by class and fixed by ``seed``. Pixels are
    standardised by the training part's mean and deviation.

    Args:
        batch_size: images per batch.
        seed: of the split.
        size: side of the resized images in pixels.
        augment: random rotation up to 10 degrees, scale 0.9 to 1.1 and shift up to 2 pixels, on training batches.
        drop_last: leave out the training part's last, smaller batch.
        num_workers: 0 is right for data that lie in memory.
    """

    num_classes = 10
    class_names = tuple(str(digit) for digit in range(10))

    def __init__(
        self,
        batch_size: int = 64,
        *,
        seed: int = 0,
        size: int = 32,
        augment: bool = True,
        drop_last: bool = False,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, drop_last)
        at_least(1, size=size)
        self.seed = seed
        self.size = size
        self.augment = augment

    def _load(self) -> dict[str, ImageTensors]:
        parts, mean, deviation = _standardised(self.seed, self.size)
        self.normalisation = (mean,) * 3, (deviation,) * 3
        if self.augment:
            parts["train"].transforms = random_affine
        return parts


def digit_parts(seed: int = 0) -> tuple[Tensor, Tensor, dict[str, np.ndarray]]:
    """All scans (1797, 8, 8) in [0, 1], their labels (1797,), and the indices of {"train", "val", "test"}."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    order = np.arange(len(labels))
    rest, test = train_test_split(order, test_size=0.2, random_state=seed, stratify=labels)
    train, val = train_test_split(rest, test_size=0.125, random_state=seed, stratify=labels[rest])
    scans = torch.from_numpy(pixels).float().view(-1, 8, 8) / 16
    return scans, torch.from_numpy(labels).long(), {"train": train, "val": val, "test": test}


def split_digits(seed: int = 0, size: int = 32) -> dict[str, ImageTensors]:
    """{"train", "val", "test"}: images (N, 3, size, size) standardised, labels (N,)."""
    return _standardised(seed, size)[0]


def _standardised(seed: int, size: int) -> tuple[dict[str, ImageTensors], float, float]:
    """The parts, and the mean and deviation of the training part's pixels."""
    scans, labels, parts = digit_parts(seed)
    images = F.interpolate(scans[:, None], size=(size, size), mode="bilinear", align_corners=False)
    images = images.expand(-1, 3, -1, -1)
    mean, deviation = images[parts["train"]].mean(), images[parts["train"]].std()
    images = (images - mean) / deviation
    split = {name: ImageTensors(images[part].contiguous(), labels[part]) for name, part in parts.items()}
    return split, float(mean), float(deviation)


def random_affine(images: Tensor, *, degrees: float = 10.0, scale: float = 0.1, shift: float = 2.0) -> Tensor:
    """Turn (degrees), scale (share) and shift (pixels) each of (N, C, H, W) at random; outside, the border repeats."""
    count, _, height, width = images.shape
    angle, size, dx, dy = torch.rand(4, count) * 2 - 1
    angle = angle * math.radians(degrees)
    size = 1 / (1 + size * scale)  # the grid says where each pixel comes from
    across = torch.stack([angle.cos() * size, -angle.sin() * size, dx * 2 * shift / width], 1)
    down = torch.stack([angle.sin() * size, angle.cos() * size, dy * 2 * shift / height], 1)
    theta = torch.stack([across, down], 1).to(images)  # (N, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
