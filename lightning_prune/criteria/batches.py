"""Batches as functions take them: any iterable, and a function that runs the model on one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from lightning_prune.errors import PruningError
from lightning_prune.graph import on_device

Loss = Callable[[nn.Module, Any], Any]
"""``loss(model, batch)`` runs the model on a batch; what it returns matters only where a gradient is wanted."""


def each_batch(model: nn.Module, batches: Iterable[Any], none: PruningError) -> Iterator[Any]:
    """Batches on the model's device, one after the other; raises ``none`` if there was not a single one."""
    if isinstance(batches, Tensor):
        raise type(none)("batches must be an iterable of batches such as a DataLoader, got one tensor")
    if not isinstance(batches, Iterable):
        raise type(none)(f"batches must be an iterable of batches such as a DataLoader, got {type(batches).__name__}")
    empty = True
    for batch in batches:
        empty = False
        yield on_device(batch, model)
    if empty:
        raise none
