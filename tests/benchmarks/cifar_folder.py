"""CIFAR-10's place in the tests of benchmarks: two classes, dark and light, of 16 images each."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from lightning_prune.models import ThinCifarResNet


def make_folder(root: Path) -> Path:
    """Write the images."""
    for part in ("train", "test"):
        for name, grey in (("dark", 20), ("light", 200)):
            place = root / "cifar10" / part / name
            place.mkdir(parents=True)
            for index in range(16):
                Image.new("RGB", (32, 32), (grey + index,) * 3).save(place / f"{index}.png")
    return root


def network(seed: int = 0, depth: int = 8, **options) -> ThinCifarResNet:
    """One of two classes."""
    torch.manual_seed(seed)
    return ThinCifarResNet(depth, num_classes=2, **options)
