"""The plain numbers that a model's Python code passes to operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.graph.recording import RunningModules
from lightning_prune.graph.rules import rule_for
from lightning_prune.graph.rules.pointwise import elementwise
from lightning_prune.graph.rules.statistics import batch_norm

FILLING = ("aten.full", "aten.new_full", "aten.fill", "aten.scalar_tensor")
ANSWERS_TRUE = ("eq", "ne", "lt", "le", "gt", "ge", "logical", "bitwise", "isnan", "isinf", "isfinite", "where")


@dataclass(frozen=True)
class PlainNumber:
    """The plain numbers that one operator got, and the modules that were running, innermost first."""

    operator: str
    values: tuple[Any, ...]
    stack: tuple[str, ...]


class PlainNumbers(TorchDispatchMode):
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
        if rule is elementwise and _keeps_form(name, args[0], tensors):
            return args[0] if func._schema.is_mutable else torch.empty_like(args[0])
        if rule is batch_norm and args[0].is_meta:
            x, *vectors = tensors
            if any(len(vector) != x.shape[1] for vector in vectors):
                sizes = [len(vector) for vector in vectors]
                raise RuntimeError(f"batch norm over {x.shape[1]} channels has parameters for {sizes}")
            return torch.empty_like(x), x.new_empty(0), x.new_empty(0)
        return func(*args, **kwargs)


def _keeps_form(name: str, first: Any, tensors: list[Tensor]) -> bool:
    """Whether the result is like the first argument: floating meta tensors of one shape, or one and numbers."""
    return (
        first is tensors[0]
        and all(t.is_meta and t.is_floating_point() and t.shape == first.shape for t in tensors)
        and not name.removeprefix("aten.").startswith(ANSWERS_TRUE)
    )
