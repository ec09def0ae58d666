"""Plain numbers that operators get: one that changes with the channels was computed from their number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from lightning_prune.graph.meta_kernels import kernel_for
from lightning_prune.graph.rules import rule_for
from lightning_prune.graph.rules.pointwise import elementwise
from lightning_prune.graph.running import RunningModules
from lightning_prune.model_state.dispatch import EagerMode

FILLING = ("aten.full", "aten.new_full", "aten.fill", "aten.scalar_tensor")
MOST_CHANNELS = 1e6
MOST_NUMBERS = 8  # in a tensor of numbers that the code wrote or computed


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
        if (name := _name_of_arithmetic(func)) is not None:
            numbers = tuple(value for value in (*args, *kwargs.values()) if isinstance(value, (int, float)))
            if numbers:
                self._found.append(PlainNumber(name, numbers, self._running.paths))
        elif func is torch.ops.aten.lift_fresh.default and not args[0].is_meta and args[0].numel() <= MOST_NUMBERS:
            self._found.append(PlainNumber("torch.tensor", tuple(args[0].flatten().tolist()), self._running.paths))
        if not kwargs and (kernel := kernel_for(func)) is not None and (found := kernel(*args)) is not None:
            return found
        return func(*args, **kwargs)


@cache
def _name_of_arithmetic(func: Any) -> str | None:
    """The operator's name, if plain numbers go into what it computes."""
    name: str = func.overloadpacket._qualified_op_name.replace("::", ".")
    return name if rule_for(func) is elementwise or name.startswith(FILLING) else None
