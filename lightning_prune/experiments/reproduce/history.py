"""What an epoch leaves behind: times, losses, the metric; the weights of the best one; and what a killed fit needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_prune.callbacks import EpochTimerCallback
from lightning_prune.callbacks.whole_checkpoints import write_whole

LOSSES = ("train_loss", "val_loss")


class Curve(EpochTimerCallback):
    """Records an epoch's losses besides its times and its metric.

    Args:
        monitor: name of the metric.
        on_epoch: called with each epoch's row.

    Attributes:
        earlier: seconds that the processes took from which this one goes on.
    """

    def __init__(self, monitor: str, on_epoch: Callable[[dict[str, Any]], None]) -> None:
        super().__init__(monitor)
        self.losses: list[dict[str, float]] = []
        self.on_epoch = on_epoch
        self.earlier = 0.0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what was logged."""
        super().on_train_epoch_end(trainer, pl_module)
        found = trainer.callback_metrics
        self.losses.append({name: float(found[name]) for name in LOSSES if name in found})
        self.on_epoch(self.rows[-1])

    def state_dict(self) -> dict[str, Any]:
        """The rows so far: plain data."""
        return {**super().state_dict(), "losses": self.losses}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        super().load_state_dict(state_dict)
        self.losses = list(state_dict["losses"])
        self.earlier = self.records[-1].elapsed_seconds if self.records else 0.0

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

    def state_dict(self) -> dict[str, Any]:
        """The best epoch so far."""
        return {"best": self.best, "weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self.best, self.weights = state_dict["best"], state_dict["weights"]


class KeepEpochs(Callback):
    """Writes a checkpoint after every epoch but the last, from which a fit that was killed goes on.

    It must stand last. A checkpoint of the last epoch would end a fit before `on_train_end`, where models are
    reconstructed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Half a file is none."""
        write_whole(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Replace the one before."""
        assert trainer.max_epochs is not None
        if trainer.current_epoch + 1 < trainer.max_epochs:
            trainer.save_checkpoint(self.path)
