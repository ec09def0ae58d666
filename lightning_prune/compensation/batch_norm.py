"""Batch-norm statistics measured anew, on the model as it is now."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_prune.compensation.repair import measured
from lightning_prune.criteria.batches import Loss
from lightning_prune.errors import CompensationError
from lightning_prune.graph import call_model
from lightning_prune.model_state.preservation import preserved


def recalibrate_bn_(model: nn.Module, batches: Iterable[Any], *, loss: Loss = call_model) -> None:
    r"""Replace the running statistics of every batch norm by their average over batches, in place.

    .. math:: \mu = \frac{1}{T} \sum_t \mu_t, \quad \sigma^2 = \frac{1}{T} \sum_t \sigma_t^2

    with mean and unbiased variance of the T batches, in order, as `torch.nn.BatchNorm2d` with ``momentum=None``. What
    enters a batch norm changes when channels before it go; see Li et al., EagleEye (ECCV 2020). Batch norms normalise
    by the batch meanwhile, everything else is in eval mode. No weight changes; a batch norm that the batches do not
    reach, or without running statistics, is left as it is. Works on the masked and on the reconstructed model alike.

    Args:
        model: any model with batch norms.
        batches: all of one size, or they count unequally; tensors in them are moved to the model's device.
        loss: ``loss(model, batch)`` runs the model on a batch, as in `lightning_prune.score`; what it returns is not
            used. The default passes the batch on: a tuple as positional arguments, a dict as keyword arguments.

    Raises:
        CompensationError: no batch norm with running statistics, or no batch. Statistics, modes and random state are
            as they were then, as after any exception from ``loss``.

    Example:
        >>> norm = nn.BatchNorm1d(1)
        >>> recalibrate_bn_(norm, [torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [8.0]])])
        >>> norm.running_mean.item(), norm.running_var.item()
        (3.5, 5.0)
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        raise CompensationError("the model has no batch norm with running statistics, so there is nothing to measure")
    momenta = [norm.momentum for norm in norms]
    try:
        with preserved(model), torch.no_grad():
            model.eval()
            for norm in norms:
                norm.train()
                norm.momentum = None  # a cumulative average
                norm.reset_running_stats()
            for batch in measured(model, batches):
                loss(model, batch)
            found = [{name: value.clone() for name, value in norm.named_buffers()} for norm in norms]
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    for norm, statistics in zip(norms, found, strict=True):
        if statistics["num_batches_tracked"]:
            for name, value in statistics.items():
                getattr(norm, name).copy_(value)
