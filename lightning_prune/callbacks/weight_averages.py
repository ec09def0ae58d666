"""Averages of the weights (EMA, SWA) that other callbacks keep: they lose the same channels as the model."""

from __future__ import annotations

from pytorch_lightning import LightningModule, Trainer
from torch import nn
from torch.optim.swa_utils import AveragedModel

from lightning_prune.graph import ChannelGraph
from lightning_prune.plan import Plan
from lightning_prune.reconstruction.masks import mask_once_
from lightning_prune.reconstruction.small_model import reconstruct_


def averages(trainer: Trainer) -> list[LightningModule]:
    """The averaged copies of the module that Lightning's callbacks keep: WeightAveraging, StochasticWeightAveraging."""
    found = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = getattr(callback, "_average_model", None)
        average = average.module if isinstance(average, AveragedModel) else average
        if isinstance(average, nn.Module):
            found.append(average)
    return found  # type: ignore[return-value]


def mask_averages_(trainer: Trainer, graph: ChannelGraph, plan: Plan) -> None:
    """Set the masked entries to zero there as well: the average of zeros from then on is zero."""
    for average in averages(trainer):
        mask_once_(average, graph, plan)


def reconstruct_averages_(trainer: Trainer, graph: ChannelGraph, plan: Plan) -> None:
    """Cut them as the model was cut."""
    for average in averages(trainer):
        reconstruct_(average, graph, plan)
