"""A recipe of a tiny network on tiny digits: a fraction of a second a cell."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.criteria.base import WeightCriterion
from lightning_prune.experiments.reproduce.plain_data import merged
from lightning_prune.experiments.reproduce.recipe import Recipe, recipe_from
from lightning_prune.tasks import ClassificationTask

HERE = "tests.experiments.reproduce.tiny"


class TinyNet(nn.Module):
    """Two convolutions that an addition ties together, one before it, and a linear layer."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.inner, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.outer, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.linear = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.norm2(self.outer(torch.relu(self.norm1(self.inner(x))))))
        return self.linear(x.mean((2, 3)))


class Counting(ClassificationTask):
    """Counts the batches that all its copies train on."""

    steps = 0

    def training_step(self, batch, batch_idx):
        Counting.steps += 1
        return super().training_step(batch, batch_idx)


class Broken(WeightCriterion):
    """A user's criterion with a mistake in it: no error of ours."""

    def __init__(self) -> None:
        self.normalize = self.combine = "mean"

    def channel_scores(self, rows):
        raise RuntimeError("the machine went down")


SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05, "momentum": 0.9}}
CONTENT: dict[str, Any] = {
    "title": "A tiny network, pruned",
    "paper": "A. Author, 2020",
    "item": "Table 1",
    "input_size": [3, 8, 8],
    "units": {"flops": "M", "params": "M"},
    "columns": {"left": "FLOPs\nleft, %", "params_left": "params\nleft, %", "acc": "accuracy, %", "change": "change"},
    "models": {"net": {"class_path": f"{HERE}.TinyNet", "init_args": {"width": 16}}},
    "known": ["What is published is made up."],
    "rows": [
        {"label": "net", "model": "net", "published": {"flops": 0.66, "params": 0.0053, "acc": 90.0}},
        {
            "label": "net L1 .5",
            "model": "net",
            "criterion": "l1",
            "published": {"flops": 0.33, "params": 0.00265, "acc": 88.0},
        },
        {"label": "net GM .5", "model": "net", "criterion": "random", "published": {"flops": 0.33, "acc": 87.0}},
    ],
    "scales": {
        "smoke": {
            "about": "Half of its width on digits of 8 pixels.",
            "cost": "A second.",
            "data": {
                "class_path": "lightning_prune.data.DigitsDataModule",
                "init_args": {"batch_size": 256, "size": 8},
            },
            "task": {"class_path": f"{HERE}.Counting", "init_args": {"num_classes": 10, "input_size": [3, 8, 8]}},
            "models": {"net": {"class_path": f"{HERE}.TinyNet", "init_args": {"width": 8}}},
            "dense": {"epochs": 1, "optimizer": SGD},
            "tune": {"epochs": 1, "optimizer": SGD},
        }
    },
}


def recipe(changes: dict[str, Any] | None = None, name: str = "tiny") -> Recipe:
    """The tiny recipe with changes."""
    return recipe_from(merged(CONTENT, changes or {}), name)


def smoke(**changes: Any) -> dict[str, Any]:
    """Changes of its scale."""
    return {"scales": {"smoke": changes}}
