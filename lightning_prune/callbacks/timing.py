"""Wall time of every training epoch, with evaluation apart."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from lightning_prune.report import EpochRecord


class EpochTimerCallback(Callback):
    """Records an `EpochRecord` per epoch in ``records``.

    Args:
        monitor: name of a logged metric to record with it, e.g. "val_acc".
    """

    def __init__(self, monitor: str | None = None) -> None:
        self.monitor = monitor
        self.records: list[EpochRecord] = []
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
            EpochRecord(
                trainer.current_epoch,
                now - self._epoch_started - self._eval_seconds,
                self._eval_seconds,
                now - self._fit_started,
                None if metric is None else float(metric),
            )
        )

    def state_dict(self) -> dict[str, Any]:
        """The records so far: plain data."""
        return {"records": [asdict(record) for record in self.records]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there; the clock too."""
        self.records = [EpochRecord(**record) for record in state_dict["records"]]
        if self.records:
            self._fit_started = time.perf_counter() - self.records[-1].elapsed_seconds
