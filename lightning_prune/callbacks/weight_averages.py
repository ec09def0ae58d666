"""Averages of the weights (EMA, SWA) that other callbacks keep: they lose the same channels as the model."""

from __future__ import annotations

from pytorch_lightning import LightningModule, Trainer
from torch import nn
from torch.optim.swa_utils import AveragedModel


def averages(trainer: Trainer) -> list[LightningModule]:
    """The averaged copies of the module that Lightning's callbacks keep: WeightAveraging, StochasticWeightAveraging."""
    found = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = getattr(callback, "_average_model", None)
        average = average.module if isinstance(average, AveragedModel) else average
        if isinstance(average, nn.Module):
            found.append(average)
    return found  # type: ignore[return-value]
