"""Batches of random tasks, in the forms in which people's loaders make them."""

from __future__ import annotations

import collections
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tests.callbacks.random_parts import CLASSES

Pair = collections.namedtuple("Pair", "image label")


class Images(Dataset):
    def __init__(self, count: int, form: str, seed: int, size: int = 8) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randn(count, 3, size, size, generator=generator)
        self.labels = torch.randint(0, CLASSES, (count,), generator=generator)
        self.form = form

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return packed(self.form, self.images[index], self.labels[index])


def packed(form: str, x: Any, y: Any) -> Any:
    forms = {
        "tuple": lambda: (x, y),
        "list": lambda: [x, y],
        "dict": lambda: {"image": x, "label": y},
        "nested": lambda: {"views": {"image": x}, "target": {"class": y, "name": "a"}},
        "named": lambda: Pair(x, y),
    }
    return forms[form]()


def unpack(batch: Any) -> tuple[Tensor, Tensor]:
    """Images and labels of whatever a loader made; of several loaders all together."""
    if isinstance(batch, dict) and "a" in batch:
        several = [unpack(part) for part in batch.values() if part is not None]
        return torch.cat([x for x, _ in several]), torch.cat([y for _, y in several])
    if isinstance(batch, dict):
        return (
            (batch["image"], batch["label"])
            if "image" in batch
            else (batch["views"]["image"], batch["target"]["class"])
        )
    if not isinstance(batch[0], Tensor):
        several = [unpack(part) for part in batch]
        return torch.cat([x for x, _ in several]), torch.cat([y for _, y in several])
    return batch[0], batch[1]


class Batches:
    """Made once, in a container that is no list: Lightning takes that for several loaders."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


def training_data(spec: Any) -> Any:
    def one(seed: int) -> Any:
        data = Images(8, spec.batch, seed)
        if spec.shuffle == "kept batches":
            return Batches(list(DataLoader(data, 4)))
        generator = torch.Generator().manual_seed(seed) if spec.shuffle == "generator" else None
        return DataLoader(data, 4, shuffle=spec.shuffle != "no", generator=generator)

    several = {"list": lambda: [one(1), one(2)], "dict": lambda: {"a": one(1), "b": one(2)}}
    return several.get(spec.loaders, lambda: one(1))()


def validation_data(spec: Any) -> Any:
    sizes = [12 if spec.sizes else 8, 8][: spec.validations]
    loaders = [DataLoader(Images(6, spec.batch, 5 + k, size), 3) for k, size in enumerate(sizes)]
    return loaders[0] if len(loaders) == 1 else loaders or None
