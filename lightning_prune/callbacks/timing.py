"""Wall time of every training epoch, with evaluation apart."""

from __future__ import annotations

import time
from dataclasses import dataclass

from pytorch_lightning import Callback, LightningModule, Trainer


@dataclass(frozen=True)
class EpochTime:
    """One epoch of training.

    Attributes:
        epoch: counted from 0.
        train_seconds: training alone.
        eval_seconds: validation inside the epoch.
        elapsed_seconds: since `fit` was called; scoring, masking and reconstruction included.
        metric: the monitored metric at the epoch's end, if any.
    """

    epoch: int
    train_seconds: float
    eval_seconds: float
    elapsed_seconds: float
    metric: float | None


class EpochTimer(Callback):
    """Records an `EpochTime` per epoch in ``records``.

    Args:
        monitor: name of a logged metric to record with it, e.g. "val_acc".
    """

    def __init__(self, monitor: str | None = None) -> None:
        self.monitor = monitor
        self.records: list[EpochTime] = []
        self._fit_started = 0.0
        self._epoch_started = 0.0
        self._eval_started = 0.0
        self._eval_seconds = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._fit_started = time.perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._eval_seconds = 0.0
        self._epoch_started = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._eval_started = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._eval_seconds += time.perf_counter() - self._eval_started

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        now = time.perf_counter()
        metric = trainer.callback_metrics.get(self.monitor) if self.monitor else None
        self.records.append(
            EpochTime(
                trainer.current_epoch,
                now - self._epoch_started - self._eval_seconds,
                self._eval_seconds,
                now - self._fit_started,
                None if metric is None else float(metric),
            )
        )
