"""Sparse learning: what is added to the gradients so that the channels that will go become small."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from benchmarks.cifar_training import Batch
from benchmarks.field.methods import Method
from benchmarks.field.pruning import peer_pruner


def regulariser(
    model: nn.Module, method: Method, share: float, batches: list[Batch], steps: int
) -> Callable[[nn.Module], object] | None:
    """To be called between backward and step; None for the control.

    Args:
        model: what learns.
        method: whose regulariser.
        share: of the MACs, that will stay.
        batches: that scores are computed on.
        steps: that sparse learning takes.
    """
    if method.library == "Torch-Pruning":
        return peer_pruner(model, method.criterion, batches[0][0][:1]).regularize
    return None
