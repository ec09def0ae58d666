"""What an epoch leaves behind: times, losses, the metric; and the weights of the best one."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_prune.callbacks import EpochTimerCallback

LOSSES = ("train_loss", "val_loss")


class Curve(EpochTimerCallback):
    """Records an epoch's losses besides its times and its metric."""

    def __init__(self, monitor: str) -> None:
        super().__init__(monitor)
        self.losses: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what was logged."""
        super().on_train_epoch_end(trainer, pl_module)
        found = trainer.callback_metrics
        self.losses.append({name: float(found[name]) for name in LOSSES if name in found})

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One per epoch: plain data."""
        return [{**asdict(record), **losses} for record, losses in zip(self.records, self.losses, strict=True)]


class BestEpoch(Callback):
    """Goes back to the weights of the epoch with the best validation, of those in the last epoch's shapes.

    It must stand before what reconstructs when training ends.
    """

    def __init__(self, monitor: str) -> None:
        self.monitor = monitor
        self.best = float("-inf")
        self.weights: dict[str, Tensor] = {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep a copy if it is the best so far."""
        state, metric = pl_module.state_dict(), float(trainer.callback_metrics[self.monitor])
        if {n: v.shape for n, v in state.items()} != {n: v.shape for n, v in self.weights.items()}:
            self.best = float("-inf")
        if metric > self.best:
            self.best, self.weights = metric, {name: value.detach().clone() for name, value in state.items()}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Load it."""
        if self.weights:
            pl_module.load_state_dict(self.weights)
