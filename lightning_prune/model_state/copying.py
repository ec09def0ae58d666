"""Copies of a model that keep the rest of the world: what cannot be copied (locks, files, pools) is shared."""

from __future__ import annotations

import copy
import copyreg
from collections import OrderedDict
from collections.abc import Mapping
from functools import cached_property, partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_prune.errors import PruningError, first_line
from lightning_prune.model_state.closures import keeps, kept, own_objects, rebound
from lightning_prune.model_state.recomputing import without_history

M = TypeVar("M", bound=nn.Module)
CONTAINERS = (list, tuple, set, frozenset, dict)
#: What a deep copy shares.
ATOMIC = frozenset({type(None), bool, int, float, complex, str, bytes, type, BuiltinFunctionType})


def copied(model: M, replaced: Mapping[int, Any] | None = None) -> M:
    """A deep copy, masks included, of normal tensors even under `torch.inference_mode`; results of autograd as values.

    replaced: by an object's id, what stands in its place.
    """
    with torch.inference_mode(False):
        try:
            return _deep_copy(model, _Memo(model, replaced or {}))
        except Exception as error:  # noqa: BLE001  # whatever an object says when it refuses
            replaced = {**without_history(model), **(replaced or {})}
            shared = _uncopyable(model, replaced)
            try:
                return _deep_copy(model, _Memo(model, {**shared, **replaced}))
            except Exception as again:  # noqa: BLE001
                raise PruningError(
                    f"the model cannot be copied: {first_line(again)}; keep the object that refuses out of the module, "
                    "or give it a __deepcopy__"
                ) from error


@torch.inference_mode(False)
def copied_to(model: M, dtype: torch.dtype) -> M:
    """A deep copy, masks included, with all floating tensors in another type; none is copied in its own type first."""
    twins: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point() and not tensor.is_inference():
            other = tensor.detach().to(dtype, copy=True)
            twins[id(tensor)] = nn.Parameter(other, tensor.requires_grad) if type(tensor) is nn.Parameter else other
    return copied(model, twins).to(dtype)


class _Memo(dict[int, Any]):
    """Copies by the id of the original, as `copy.deepcopy` keeps them, and what the model has for itself."""

    def __init__(self, model: nn.Module, replaced: Mapping[int, Any]) -> None:
        super().__init__(replaced)
        self.model = model

    @cached_property
    def own(self) -> frozenset[int]:
        return own_objects(self.model)


def _deep_copy(item: Any, memo: _Memo) -> Any:
    """`copy.deepcopy`, three times as fast on modules, which hold a dozen empty containers each."""
    kind: Any = type(item)
    new: Any
    if kind in ATOMIC:
        return item
    if (known := memo.get(id(item), memo)) is not memo:
        return known
    if kind is FunctionType:
        return _copy_of_function(item, memo)
    if kind is dict or (kind is OrderedDict and not vars(item)):
        memo[id(item)] = new = kind()
        for key, value in item.items():
            new[_deep_copy(key, memo)] = value if type(value) in ATOMIC else _deep_copy(value, memo)
        return new
    if kind is list:
        memo[id(item)] = new = []
        new += [_deep_copy(value, memo) for value in item]
        return new
    if kind is set and not item:
        memo[id(item)] = new = set()
        return new
    if kind is tuple and all(type(value) in ATOMIC for value in item):
        return item
    if isinstance(item, nn.Module) and _copies_as_object(item):
        return _copy_of_module(item, memo)
    if isinstance(item, Tensor) and not item.is_leaf:  # a result of autograd, which torch refuses to copy
        memo[id(item)] = new = item.detach().clone()
        return new
    return copy.deepcopy(item, memo)


def _copy_of_function(function: FunctionType, memo: _Memo) -> FunctionType:
    """The function itself, unless a part of the model is in a variable around it."""
    if all(type(part) in ATOMIC for part in kept(function)) or not keeps(function, memo.own):
        return function
    return rebound(function, memo.own, partial(_deep_copy, memo=memo), memo)


def _copy_of_module(module: nn.Module, memo: _Memo) -> nn.Module:
    kind = type(module)
    memo[id(module)] = new = kind.__new__(kind)
    state = module.__getstate__()
    if type(state) is dict:
        state = {name: value if type(value) in ATOMIC else _deep_copy(value, memo) for name, value in state.items()}
    else:  # a class with slots, or one that says for itself what it is
        state = _deep_copy(state, memo)
    if state is not None:
        new.__setstate__(state)
    return new


def _copies_as_object(module: nn.Module) -> bool:
    """Whether `copy.deepcopy` would make a new object and hand ``__setstate__`` a copy of the attributes."""
    kind = type(module)
    return (
        kind.__reduce_ex__ is object.__reduce_ex__
        and kind.__reduce__ is object.__reduce__
        and not hasattr(kind, "__getnewargs_ex__")
        and not hasattr(kind, "__getnewargs__")
        and kind not in copyreg.dispatch_table
        and not isinstance(module, (list, dict))
        and "__reduce_ex__" not in vars(module)
        and getattr(module, "__deepcopy__", None) is None
    )


def _uncopyable(model: nn.Module, replaced: Mapping[int, Any]) -> dict[int, Any]:
    """{id: object} of what refuses to be copied; of an object that is part of no module, the whole object."""
    own: dict[int, Any] = {id(item): item for item in (*model.modules(), *model.parameters(), *model.buffers())}
    found: dict[int, Any] = {}
    seen: dict[int, Any] = {**own, **replaced}

    def refuses(item: Any) -> bool:
        if id(item) in seen or isinstance(item, (Tensor, type)):
            return False
        seen[id(item)] = item
        parts = _parts(item)
        if parts is None:
            found[id(item)] = item
            return True
        refused = sum(map(refuses, parts)) > 0  # not any(...), which would stop at the first
        if refused and not isinstance(item, (*CONTAINERS, MethodType)) and not _reaches(item, own):
            found[id(item)] = item  # half a thread pool is none
        return refused

    for module in model.modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                refuses(value)
    return found


def _parts(item: Any) -> list[Any] | None:
    """What `copy.deepcopy` would copy next, None if it would refuse the object itself."""
    if isinstance(item, MethodType):
        return [item.__self__]
    kind = type(item)
    if kind in CONTAINERS:
        return [*item, *item.values()] if isinstance(item, dict) else list(item)
    if kind in copy._deepcopy_dispatch or hasattr(kind, "__deepcopy__"):  # type: ignore[attr-defined]
        return []
    try:
        reduce = copyreg.dispatch_table.get(kind)
        how = reduce(item) if reduce else item.__reduce_ex__(4)
    except Exception:  # noqa: BLE001  # whatever an object says when it refuses
        return None
    inside = [*item, *item.values()] if isinstance(item, dict) else list(item) if isinstance(item, list) else []
    return inside if isinstance(how, str) else [*how[1:3], *inside]


def _reaches(item: Any, own: Mapping[int, Any]) -> bool:
    """Whether an object leads to a module or tensor of the model, which a copy must have for itself."""
    seen: dict[int, Any] = {}
    to_do: list[Any] = [item]
    while to_do:
        if id(part := to_do.pop()) in own:
            return True
        if id(part) not in seen:
            seen[id(part)] = part
            to_do += _parts(part) or ()
    return False
