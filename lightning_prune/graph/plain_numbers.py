"""Plain numbers that operators get: one that changes with the channels was computed from their number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_prune.graph.rules import rule_for
from lightning_prune.graph.rules.pointwise import elementwise
from lightning_prune.graph.rules.statistics import batch_norm
from lightning_prune.graph.running import RunningModules
from lightning_prune.model_state.dispatch import EagerMode

FILLING = ("aten.full", "aten.new_full", "aten.fill", "aten.scalar_tensor")
MOST_CHANNELS = 1e6
MOST_NUMBERS = 8  # in a tensor of numbers that the code wrote or computed
ANSWERS_TRUE = ("eq", "ne", "lt", "le", "gt", "ge", "logical", "bitwise", "isnan", "isinf", "isfinite", "where")


@dataclass(frozen=True)
class PlainNumber:
    """The plain numbers that one operator got, and the modules that were running, innermost first."""

    operator: str
    values: tuple[Any, ...]
    stack: tuple[str, ...]


def computed_of(before: Sequence[Any], after: Sequence[Any]) -> frozenset[int]:
    """Integers of which a number that changed may have been computed: itself, its root, its reciprocal, or 1 / root."""
    changed = [abs(a) for a, b in zip(before, after, strict=False) if a != b and isinstance(a, (int, float)) and a]
    of = (n for value in changed for n in (value, value**2, 1 / value, value**-2))
    return frozenset(round(n) for n in of if 1 < n < MOST_CHANNELS and abs(n - round(n)) < 1e-6 * n)


class PlainNumbers(EagerMode):
    """Notes the numbers that go into arithmetic: one that changes with the channels was computed from their count.

    On the meta device it also answers for the commonest operators, which torch decomposes into many there.
    """

    def __init__(self, running: RunningModules, found: list[PlainNumber]) -> None:
        super().__init__()
        self._running = running
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket._qualified_op_name.replace("::", ".")
        rule = rule_for(func)
        arguments = (*args, *kwargs.values())
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        if rule is elementwise or name.startswith(FILLING):
            numbers = tuple(value for value in arguments if isinstance(value, (int, float)))
            if numbers:
                self._found.append(PlainNumber(name, numbers, self._running.paths))
        if name == "aten.lift_fresh" and not args[0].is_meta and args[0].numel() <= MOST_NUMBERS:
            self._found.append(PlainNumber("torch.tensor", tuple(args[0].flatten().tolist()), self._running.paths))
        if rule is elementwise and _keeps_form(name, args[0], tensors):
            return args[0] if func._schema.is_mutable else torch.empty_like(args[0])
        if rule is batch_norm and args[0].is_meta:
            x, *vectors = tensors
            if any(len(vector) != x.shape[1] for vector in vectors):
                sizes = [len(vector) for vector in vectors]
                raise RuntimeError(f"batch norm over {x.shape[1]} channels has parameters for {sizes}")
            return torch.empty_like(x), x.new_empty(0), x.new_empty(0)
        if name == "aten.grid_sampler_2d" and args[0].is_meta and len(args[0]) == len(args[1]):
            return args[0].new_empty(*args[0].shape[:2], *args[1].shape[1:3])  # else about 90 operators
        return func(*args, **kwargs)


def _keeps_form(name: str, first: Any, tensors: list[Tensor]) -> bool:
    """Whether the result is like the first argument: floating meta tensors of one shape, or one and numbers."""
    return (
        first is tensors[0]
        and all(t.is_meta and t.is_floating_point() and t.shape == first.shape for t in tensors)
        and not name.removeprefix("aten.").startswith(ANSWERS_TRUE)
    )
