"""A network, data and a working directory for the commands about one model."""

from __future__ import annotations

from pathlib import Path

import torch
from pytorch_lightning import LightningDataModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune.cli import main

NET = f"{__name__}.tiny_net"
MODEL = ["--model", NET, "--input", "2", "3", "8", "8"]


def tiny_net(width: int = 16, classes: int = 3) -> nn.Module:
    body = [nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


class TinyData(LightningDataModule):
    def __init__(self, batch: int = 6) -> None:
        super().__init__()
        self.batch = batch

    def train_dataloader(self):
        images = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(images, torch.arange(12) % 3), self.batch)


class DescribedData(TinyData):
    class_names = ("a", "b", "c")
    normalisation = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def val_dataloader(self):
        images = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(images, torch.arange(40) % 3), 16)


def files() -> set[str]:
    return {path.name for path in Path().iterdir()}


def refused(capsys, *argv: str) -> str:
    """Standard error of a command that must fail; one line, and nothing is written."""
    before = files()
    try:
        status = main(list(argv))
    except SystemExit as stop:
        status = stop.code
    assert status in (1, 2)
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert files() == before
    return err
