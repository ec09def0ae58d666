"""Sparse learning: what is added to the gradients so that the channels that will go become small."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

import lightning_prune as lp
from benchmarks.cifar_training import Batch
from benchmarks.field.methods import Method
from benchmarks.field.pruning import criterion_of, loss_of, peer_pruner
from lightning_prune.criteria import GroupSparsity, condemned_strengths

STRENGTH = 0.5  # at the end; at a rate that falls from 0.02 over two epochs nothing that counts is left


def regulariser(
    model: nn.Module, method: Method, share: float, batches: list[Batch], steps: int
) -> Callable[[nn.Module], object] | None:
    """To be called between backward and step; None for the control.

    This library's grows on the channels that the method would remove now, to which they belong from then on;
    Torch-Pruning's weighs all channels by their norm, with the settings of its own benchmark.

    Args:
        model: what learns.
        method: whose regulariser.
        share: of the MACs, that will stay.
        batches: that scores are computed on.
        steps: that sparse learning takes.
    """
    if method.library == "none":
        return None
    inputs = batches[0][0][:1]
    if method.library == "Torch-Pruning":
        return peer_pruner(model, method, inputs).regularize
    graph = lp.trace(model, inputs)
    scores = lp.score(model, graph, criterion_of(method), batches=batches, loss=loss_of)
    selection = lp.Budget(flops=share, order="share" if method.uniform else "score")
    plan = selection.select(graph, scores, model=model, example_inputs=inputs)
    penalty, factors = GroupSparsity(model, graph, condemned_strengths(plan)), iter(range(1, steps + 1))
    return lambda _: penalty.add_(STRENGTH * next(factors) / steps)
