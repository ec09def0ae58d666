"""Functions that have a part of a model in a variable around them: hooks, replaced forwards, attributes.

`copy.deepcopy` shares functions, so those of a copy would go on running the original's parts.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn


def own_objects(model: nn.Module) -> frozenset[int]:
    """Ids of what a copy of the model has for itself: modules, tensors, and what stands in their attributes."""
    found = {id(item) for item in (*model.modules(), *model.parameters(), *model.buffers())}
    for module in model.modules():
        found |= {id(value) for value in vars(module).values() if not isinstance(value, (FunctionType, type))}
    return frozenset(found)


def keeps(item: Any, own: Container[int], seen: set[int] | None = None) -> bool:
    """Whether something is one of these objects, or a function, method or container that keeps one."""
    seen = set() if seen is None else seen
    if id(item) in own:
        return not isinstance(item, (bool, int, float, complex, str, bytes, type(None)))
    if id(item) in seen:
        return False
    seen.add(id(item))
    if isinstance(item, FunctionType):
        return any(keeps(part, own, seen) for part in kept(item))
    if isinstance(item, MethodType):
        return keeps(item.__self__, own, seen)
    if isinstance(item, partial):
        return any(keeps(part, own, seen) for part in (item.func, *item.args, *item.keywords.values()))
    if type(item) in (list, tuple, dict):
        return any(id(part) in own for part in (item.values() if isinstance(item, dict) else item))
    return False


def kept(function: FunctionType) -> list[Any]:
    """What a function has in variables around it, and as defaults."""
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    return [*defaults, *(cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell))]


def _is_filled(cell: CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


def rebound(
    function: FunctionType, own: Container[int], copy: Callable[[Any], Any], memo: dict[int, Any]
) -> FunctionType:
    """The same code around copies of what it keeps of the model; the rest is shared."""
    cells = [memo.setdefault(id(cell), CellType()) for cell in function.__closure__ or ()]
    new = FunctionType(function.__code__, function.__globals__, function.__name__, None, tuple(cells))
    memo[id(function)] = new  # the model may lead back to it

    def of_copy(item: Any) -> Any:
        return copy(item) if keeps(item, own) else item

    new.__dict__.update(function.__dict__)
    for name in ("__module__", "__qualname__", "__doc__", "__annotations__"):
        setattr(new, name, getattr(function, name))
    new.__defaults__ = function.__defaults__ and tuple(map(of_copy, function.__defaults__))
    new.__kwdefaults__ = function.__kwdefaults__ and {k: of_copy(v) for k, v in function.__kwdefaults__.items()}
    for old, cell in zip(function.__closure__ or (), cells, strict=True):
        if _is_filled(old) and not _is_filled(cell):
            cell.cell_contents = of_copy(old.cell_contents)
    return new
