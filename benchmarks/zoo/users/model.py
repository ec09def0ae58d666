"""How a table describes a model: how to build it, what it eats, at which sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Size = tuple[int, ...]


def images(batch: int, size: Size) -> Tensor:
    """Random images, or volumes, of three channels."""
    return sized(3)(batch, size)


def sized(channels: int) -> Callable[[int, Size], Tensor]:
    """Random inputs of so many channels."""
    return lambda batch, size: torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Model:
    """A model of a library.

    ``sizes``: of the inputs, without batch and channels. The first is traced; of the others the first that the dense
    model takes is only checked.
    """

    build: Callable[[], nn.Module]
    family: str
    kind: str = "cnn"  # or hybrid, transformer, other
    sizes: tuple[Size, ...] = ((64, 64), (96, 64), (96, 96))
    inputs: Callable[[int, Size], Any] = images
