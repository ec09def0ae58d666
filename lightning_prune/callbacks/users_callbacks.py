"""Callbacks of the user's own that keep weights (averages by hand) or set what steps read, copied to be run.

A trace, a rehearsal and a scoring pass run their hooks; which are still to come is known by the hook that runs now.
"""

from __future__ import annotations

import copy
import dis
import inspect
from collections.abc import Iterable, Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_prune.callbacks.first_batches import LIGHTNING

OURS = (*LIGHTNING, "lightning_prune.")
DEPTH = 4  # of attributes in attributes, of functions that call functions
WRITES = ("data", "load_state_dict", "update_parameters", "setattr")
RUN_STEPS = ("PruneCallback", "ScoringCallback", "GroupSparsityCallback")  # by name: their modules import this one
PAST = {  # by the hook that runs now: those that the module runs no more before the next step of this fit
    "on_train_start": ("on_fit_start",),
    "on_train_epoch_start": ("on_fit_start", "on_train_start"),
    "on_train_batch_start": ("on_fit_start", "on_train_start", "on_train_epoch_start"),
    "on_train_batch_end": ("on_fit_start", "on_train_start", "on_train_epoch_start"),
    "on_train_epoch_end": ("on_fit_start", "on_train_start"),
    "on_train_end": ("on_fit_start", "on_train_start"),
    "on_fit_end": ("on_fit_start", "on_train_start"),
}


def taking_part(trainer: Trainer, pl_module: LightningModule) -> list[Callback]:
    """Callbacks that hold tensors, or whose code writes into some or sets attributes of the module.

    Others may keep books that no copy protects.
    """
    return [
        callback
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if not _is_ours(callback)
        and (_holds_tensors(vars(callback)) or _sets_state(type(callback)) or _writes(type(callback), type(pl_module)))
    ]


def running_hook(pl_module: LightningModule) -> str:
    """The hook that the Trainer calls now; "" where it calls none."""
    return getattr(pl_module, "_current_fx_name", None) or ""


def past_hooks(trainer: Trainer, pl_module: LightningModule, callback: Callback | None = None) -> tuple[str, ...]:
    """The hooks before a step that have run in this fit, and in this epoch: of the module, or of a callback."""
    now = running_hook(pl_module)
    if callback is None:
        return PAST.get(now, ())  # callbacks come first
    for one in trainer.callbacks:  # type: ignore[attr-defined]
        if any(base.__name__ in RUN_STEPS for base in type(one).__mro__):
            break
        if one is callback:
            return (*PAST.get(now, ()), now)
    return PAST.get(now, ())


def copies_for(
    model: nn.Module, pl_module: LightningModule, callbacks: list[Callback], trainer: Trainer
) -> list[tuple[Callback, Any]]:
    """Callbacks and copies of them that know a copy of the module instead; those that cannot be copied are left out."""
    if not callbacks:
        return []
    twins: dict[int, Any] = {id(a): b for a, b in zip(pl_module.modules(), model.modules(), strict=True)}
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    mine = (*pl_module.named_parameters(), *pl_module.named_buffers())
    twins |= {id(tensor): named[name] for name, tensor in mine} | {id(trainer): trainer}
    copies = []
    for callback in callbacks:
        try:
            copies.append((callback, copy.deepcopy(callback, dict(twins))))
        except Exception:  # noqa: BLE001 - whatever a copy may raise
            continue
    return copies


def in_type_of_(model: nn.Module, pl_module: LightningModule, callbacks: Iterable[Any]) -> None:
    """Give the plain tensors that a copy of the module and copies of callbacks keep the type that it has.

    ``module.to`` gives it to parameters and buffers only; an average that was kept by hand would not meet them.
    """
    before, after = _type_of(pl_module), _type_of(model)
    if after in (None, before):
        return
    assert after is not None
    for callback in callbacks:
        _to_type_(vars(callback), before, after)
    for twin, module in zip(model.modules(), pl_module.modules(), strict=True):
        own = vars(twin)
        for name in own:
            if own[name] is not vars(module).get(name) and name not in ("_parameters", "_buffers", "_modules"):
                own[name] = _to_type_(own[name], before, after)  # what both have was not copied


def _type_of(module: nn.Module) -> torch.dtype | None:
    return next((parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()), None)


def _to_type_(value: Any, before: torch.dtype | None, after: torch.dtype, depth: int = DEPTH) -> Any:
    """Plain tensors in attributes and containers in another type, as ``module.to`` has its parameters and buffers."""
    if type(value) is Tensor:
        return value.to(after) if value.dtype == before else value
    if isinstance(value, nn.Module):
        return value.to(after)
    if depth == 0 or isinstance(value, Trainer) or callable(value):
        return value
    if isinstance(value, (dict, list)):
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            value[key] = _to_type_(item, before, after, depth - 1)
    elif type(value) is tuple:
        return tuple(_to_type_(item, before, after, depth - 1) for item in value)
    elif hasattr(value, "__dict__"):
        _to_type_(vars(value), before, after, depth - 1)
    return value


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


def _sets_state(callback: type) -> bool:
    """Whether its code sets an attribute of the module that a hook is given, which a step may read."""
    return any(_sets_attribute(name, function) for name, function in _functions(_own_bases(callback)))


def _sets_attribute(name: str, function: FunctionType) -> bool:
    code = function.__code__
    given = code.co_varnames[: code.co_argcount][2 if name.startswith("on_") else 1 :]  # hooks: self, trainer, module
    module = False
    for instruction in dis.get_instructions(code):
        kind, of = instruction.opname, instruction.argval
        if kind == "STORE_ATTR" and module:
            return True
        if kind.startswith(("LOAD_ATTR", "LOAD_METHOD")):
            module = module or of == "lightning_module"
        elif "LOAD" in kind and kind != "LOAD_CONST":
            variable = of[-1] if isinstance(of, tuple) else of
            module = variable in given and variable != "trainer"
    return False


def writes_weights(part: type, hook: str, module: type) -> bool:
    """Whether a hook of a callback or of the module, or what it calls, works in place."""
    function = getattr(part, hook, None)
    return isinstance(function, FunctionType) and _works_in_place([function], _own_bases(part, module))


def _writes(callback: type, module: type) -> bool:
    """Whether a hook, or what it calls, works in place, as an average of weights does."""
    hooks = [function for _, function in _functions(_own_bases(callback))]
    return _works_in_place(hooks, _own_bases(callback, module))


def _works_in_place(functions: Iterable[FunctionType], owners: tuple[type, ...]) -> bool:
    names = {name for function in functions for name in _names(function, owners, DEPTH)}
    return any(name in WRITES or name.startswith("_foreach_") or _in_place(name) for name in names)


def _own_bases(*parts: type) -> tuple[type, ...]:
    """The classes that are the user's own."""
    return tuple(base for part in parts for base in part.__mro__ if not f"{base.__module__}.".startswith(OURS))


def _functions(owners: tuple[type, ...]) -> list[tuple[str, FunctionType]]:
    return [(name, value) for base in owners for name, value in vars(base).items() if isinstance(value, FunctionType)]


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
