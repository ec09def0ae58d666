"""Networks that train in a second, and the configurations that name them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

HERE = __name__
SGD = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05, "momentum": 0.9}}
ADAM = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}


class Classifier(nn.Module):
    """A stem, two convolutions that an addition ties to it, and a linear layer."""

    def __init__(self, width: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.inner, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.outer, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.linear = nn.Linear(width, classes)

    def maps(self, x: Tensor) -> Tensor:
        """Before they are averaged."""
        x = torch.relu(self.norm(self.stem(x)))
        return torch.relu(x + self.norm2(self.outer(torch.relu(self.norm1(self.inner(x))))))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.linear(self.maps(x).mean((2, 3)))


class Segmenter(Classifier):
    """The same with a class for every pixel."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # noqa: D102
        return {"out": self.linear(self.maps(x).movedim(1, -1)).movedim(-1, 1)}


def _task(kind: str, model: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {"class_path": f"lightning_prune.tasks.{kind}", "init_args": {"model": model, **rest}}


TASKS: dict[str, dict[str, Any]] = {
    "classification": {
        "model": _task(
            "ClassificationTask",
            {"class_path": f"{HERE}.Classifier"},
            num_classes=10,
            input_size=[3, 8, 8],
            optimizer=SGD,
            lr_scheduler="cosine",
        ),
        "data": {"class_path": "lightning_prune.data.DigitsDataModule", "init_args": {"batch_size": 32, "size": 8}},
    },
    "segmentation": {
        "model": _task(
            "SegmentationTask",
            {"class_path": f"{HERE}.Segmenter", "init_args": {"classes": 11}},
            num_classes=11,
            input_size=[3, 32, 32],
            optimizer=ADAM,
            lr_scheduler="poly",
        ),
        "data": {
            "class_path": "lightning_prune.data.ScenesSegmentation",
            "init_args": {"batch_size": 8, "size": 32, "lengths": [24, 8, 8], "objects": [1, 1], "extent": [0.5, 0.7]},
        },
    },
    "detection": {
        "model": _task(
            "DetectionTask",
            {
                "class_path": "lightning_prune.models.YoloV3Tiny",
                "init_args": {
                    "num_classes": 10,
                    "width": 0.0625,
                    "anchors": [[9, 15], [11, 18], [13, 21], [16, 23], [15, 26], [20, 27]],
                },
            },
            num_classes=10,
            detector={"class_path": "lightning_prune.tasks.YoloDetector", "init_args": {"size": 32}},
            optimizer=ADAM,
            burn_in=2,
            input_size=[3, 32, 32],
        ),
        "data": {
            "class_path": "lightning_prune.data.ScenesDetection",
            "init_args": {"batch_size": 4, "size": 32, "lengths": [12, 4, 4], "objects": [1, 1], "extent": [0.5, 0.7]},
        },
    },
}
RECIPE: dict[str, Any] = {
    "title": "A tiny network, pruned",
    "paper": "nobody",
    "item": "Table 0",
    "input_size": [3, 8, 8],
    "units": {"flops": "M", "params": "M"},
    "columns": {"left": "FLOPs left, %", "acc": "accuracy, %", "change": "change"},
    "models": {"net": {"class_path": f"{HERE}.Classifier", "init_args": {"width": 8}}},
    "known": ["Nothing is published."],
    "rows": [
        {"label": "net", "model": "net", "published": {"acc": 90.0}},
        {"label": "net L1 .5", "model": "net", "criterion": "l1", "published": {"acc": 88.0}},
        {"label": "net random .5", "model": "net", "criterion": "random", "published": {"acc": 87.0}},
    ],
    "scales": {
        "smoke": {
            "about": "Digits of 8 pixels.",
            "cost": "A second.",
            "data": TASKS["classification"]["data"],
            "task": {
                "class_path": "lightning_prune.tasks.ClassificationTask",
                "init_args": {"num_classes": 10, "input_size": [3, 8, 8]},
            },
            "models": {"net": {"class_path": f"{HERE}.Classifier", "init_args": {"width": 8}}},
            "dense": {"epochs": 1, "optimizer": SGD},
            "tune": {"epochs": 1, "optimizer": SGD},
        }
    },
}


def configuration(task: str) -> dict[str, Any]:
    """What ``fit`` takes: an epoch dense, then two steps of pruning, reconstructed after each, then fine-tuning."""
    checkpoints = {"filename": "{epoch}", "save_top_k": -1, "save_last": True}
    prune = {
        "criterion": {"class_path": "lightning_prune.JRE"},
        "ratio": 0.5,
        "start": 1,
        "schedule": {"class_path": "lightning_prune.schedule.Gradual", "init_args": {"rounds": 2}},
        "reconstruct": "during",
        "score_batches": 2,
    }
    callbacks = [
        {"class_path": "pytorch_lightning.callbacks.ModelCheckpoint", "init_args": checkpoints},
        {"class_path": "lightning_prune.PruneCallback", "init_args": prune},
    ]
    trainer = {
        "max_epochs": 4,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_train_batches": 3,
        "limit_val_batches": 1,
        "log_every_n_steps": 1,
        "callbacks": callbacks,
    }
    return {"seed_everything": 0, "trainer": trainer, **TASKS[task]}


def write_configuration(path: Path, content: dict[str, Any]) -> None:
    """As YAML."""
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
