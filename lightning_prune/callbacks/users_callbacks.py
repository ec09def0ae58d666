"""Callbacks of the user's own that keep weights (averages by hand), copied so that a trace can run their hooks."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_prune.callbacks.first_batches import LIGHTNING

OURS = (*LIGHTNING, "lightning_prune.")
DEPTH = 4  # of attributes in attributes, of functions that call functions
WRITES = ("data", "load_state_dict", "update_parameters", "setattr")


def weight_keepers(trainer: Trainer, pl_module: LightningModule) -> list[Callback]:
    """Callbacks that hold tensors, or whose code writes into some; others may keep books that no copy protects."""
    return [
        callback
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if not _is_ours(callback) and (_holds_tensors(vars(callback)) or _writes(type(callback), type(pl_module)))
    ]


def copies_for(model: nn.Module, pl_module: LightningModule, callbacks: list[Callback], trainer: Trainer) -> Any:
    """Copies of callbacks that know a copy of the module instead of it; those that cannot be copied are left out."""
    if not callbacks:
        return []
    twins: dict[int, Any] = {id(a): b for a, b in zip(pl_module.modules(), model.modules(), strict=True)}
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    mine = (*pl_module.named_parameters(), *pl_module.named_buffers())
    twins |= {id(tensor): named[name] for name, tensor in mine} | {id(trainer): trainer}
    copies = []
    for callback in callbacks:
        try:
            copies.append(copy.deepcopy(callback, dict(twins)))
        except Exception:  # noqa: BLE001 - whatever a copy may raise
            continue
    return copies


def _is_ours(callback: Callback) -> bool:
    """Whether it is one of Lightning's or of this package, or made of one: what they do in hooks is no user's code."""
    bases = (base for base in type(callback).__mro__ if base.__name__ not in ("Callback", "object"))
    return any(f"{base.__module__}.".startswith(OURS) for base in bases)


def _holds_tensors(value: Any, depth: int = DEPTH) -> bool:
    if isinstance(value, (Tensor, nn.Module)):
        return True
    if isinstance(value, Trainer) or depth == 0:
        return False
    inner: Any = value if isinstance(value, (list, tuple, set)) else ()
    inner = value.values() if isinstance(value, Mapping) else inner
    attributes = vars(value).values() if hasattr(value, "__dict__") and not isinstance(value, type) else ()
    return any(_holds_tensors(item, depth - 1) for item in (*inner, *attributes))


def _writes(callback: type, module: type) -> bool:
    """Whether a hook, or what it calls, works in place, as an average of weights does."""
    owners = tuple(base for base in (*callback.__mro__, *module.__mro__) if not f"{base.__module__}.".startswith(OURS))
    own = [base for base in owners if issubclass(callback, base)]
    hooks = [value for base in own for value in vars(base).values() if isinstance(value, FunctionType)]
    names = {name for hook in hooks for name in _names(hook, owners, DEPTH)}
    return any(name in WRITES or name.startswith("_foreach_") or _in_place(name) for name in names)


def _in_place(name: str) -> bool:
    return name.endswith("_") and not name.startswith("_") and name != "requires_grad_"


def _names(function: FunctionType, owners: tuple[type, ...], depth: int) -> Iterator[str]:
    """Every name that its code uses, and that of the functions and methods that it calls by name."""
    found = set(_in_code(function.__code__))
    yield from found
    if depth == 0:
        return
    known = dict(inspect.getclosurevars(function).nonlocals)
    for name in found | set(known):
        for value in (function.__globals__.get(name), known.get(name), *(vars(owner).get(name) for owner in owners)):
            if isinstance(value, FunctionType) and not value.__module__.startswith(("torch", *OURS)):
                yield from _names(value, owners, depth - 1)


def _in_code(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _in_code(constant)
