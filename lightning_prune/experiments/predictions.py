"""Predictions of two models side by side: how many differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

PIXELS = 0.01  # boxes that are closer are the same


def count_changed(before: Any, after: Any) -> tuple[int, int]:
    """How many predictions of a batch differ between two models, and how many were compared.

    Args:
        before: scores (N, C, ...), of which the highest is the class that is predicted; classes of any shape as
            integers; or a sequence with one dict per image: ``boxes`` (n, 4) in pixels and ``labels`` (n,), which are
            one prediction.
        after: the same of the other model.

    Returns:
        (changed, compared); (0, 0) for predictions in another form.

    Example:
        >>> import torch
        >>> count_changed(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([[0.6, 0.4], [0.7, 0.3]]))
        (1, 2)
    """
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        if before.is_floating_point():
            if before.dim() < 2:
                return 0, 0
            before, after = before.argmax(1), after.argmax(1)
        return int((before != after).sum()), before.numel()
    if isinstance(before, Sequence) and all(isinstance(found, Mapping) and "boxes" in found for found in before):
        changed = sum(not _same_objects(*pair) for pair in zip(before, after, strict=True))
        return changed, len(before)
    return 0, 0


def _same_objects(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> bool:
    if before["labels"].shape != after["labels"].shape or not bool((before["labels"] == after["labels"]).all()):
        return False
    return bool(((before["boxes"] - after["boxes"]).abs() <= PIXELS).all())
