"""Plain numbers that operators get: one that changes with the channels was computed from their number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_prune.graph.meta_kernels import answer
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

    def __init__(self, running: RunningModules, found: list[PlainNumber], operators: list[Any] | None = None) -> None:
        super().__init__()
        self._running = running
        self._found = found
        self._operators: list[Any] = [] if operators is None else operators  # all that run

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._operators.append(func)
        note_numbers(func, args, kwargs, self._running, self._found)
        return answer(func, args, kwargs)


def note_numbers(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], running: RunningModules, found: list[PlainNumber]
) -> None:
    """Add the numbers that an operator gets, if there are any."""
    if (name := _name_of_arithmetic(func)) is not None:
        numbers = tuple(value for value in (*args, *kwargs.values()) if isinstance(value, (int, float)))
        if numbers:
            found.append(PlainNumber(name, numbers, running.paths))
    elif func is torch.ops.aten.lift_fresh.default and not args[0].is_meta and args[0].numel() <= MOST_NUMBERS:
        found.append(PlainNumber("torch.tensor", tuple(args[0].flatten().tolist()), running.paths))


def same_numbers(one: Sequence[PlainNumber], other: Sequence[PlainNumber]) -> bool:
    """Whether two runs gave the same operators the same numbers."""
    return repr([(n.operator, n.values) for n in one]) == repr(
        [(n.operator, n.values) for n in other]
    )  # NaN is not NaN


class OperatorLog(EagerMode):
    """Notes every operator with what it gets, of tensors their shapes, as text."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shown = tree_map(lambda value: tuple(value.shape) if isinstance(value, Tensor) else value, (args, kwargs))
        self._found.append(f"{func} {shown}")
        return answer(func, args, kwargs or {})


@cache
def _name_of_arithmetic(func: Any) -> str | None:
    """The operator's name, if plain numbers go into what it computes."""
    name: str = func.overloadpacket._qualified_op_name.replace("::", ".")
    return name if rule_for(func) is elementwise or name.startswith(FILLING) else None
