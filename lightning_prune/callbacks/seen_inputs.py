"""What a module's forward is given in its own steps, where no example was set."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from lightning_prune.callbacks.first_batches import overrides
from lightning_prune.errors import CallbackError
from lightning_prune.graph.entry_points import EntryPoint, head
from lightning_prune.graph.running import call_model, map_tensors, tensors_in, untouched
from lightning_prune.model_state.originals import WritesUndone
from lightning_prune.model_state.preservation import copy_sharing_tensors
from lightning_prune.reconstruction.rehearsal import SAMPLES


class _Call(NamedTuple):
    """The first call of a module: its path, "" for the LightningModule itself, and what it was given."""

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Seen(BaseException):
    """Ends a step, also where that catches every Exception."""


def seen_inputs(pl_module: LightningModule, steps: Sequence[EntryPoint]) -> Any:
    """The inputs of the first forward in ``training_step``, else in ``validation_step``, of two samples.

    A step that calls parts of the module instead, ``self.net(x)``, gives the inputs too: those of the first part to
    which forward hands what it is given as it is. The step runs on a copy.

    Returns:
        None if no step calls such a forward.

    Raises:
        CallbackError: a training step failed before it called the module, or there is no forward at all.
    """
    for name in ("training_step", "validation_step"):
        try:
            calls = _first_calls(pl_module, steps, name)
        except CallbackError:
            if name == "training_step":
                raise
            continue
        if calls and not overrides(pl_module, "forward"):
            raise CallbackError(_no_forward(pl_module, name, calls[0].path))
        for call in calls:
            example = _as_example(pl_module, call)
            if example is not None and (not call.path or _hands_on(pl_module, example, call)):
                return example
    return None


def called_instead(pl_module: LightningModule, steps: Sequence[EntryPoint]) -> str:
    """The part of the module that ``training_step`` calls first if it never calls ``self(...)``; "" if not known."""
    try:
        calls = _first_calls(pl_module, steps, "training_step")
    except CallbackError:
        return ""
    return calls[0].path if calls else ""


def _no_forward(pl_module: LightningModule, step: str, path: str) -> str:
    return (
        f"{type(pl_module).__name__} defines no forward, which says what the smaller model will be used for; {step} "
        f"calls self.{path}(...). Define it, such as `def forward(self, x): return self.{path}(x)`"
    )


def _first_calls(pl_module: LightningModule, steps: Sequence[EntryPoint], name: str) -> list[_Call]:
    """What the first step of that name calls: the module itself, or else its parts, in their order."""
    step = next((entry for entry in steps if entry.name.startswith(name)), None)
    if step is None:
        return []
    parts: list[_Call] = []
    failure: Exception | None = None
    for tried in (head(step, SAMPLES), step):  # not every batch can be cut
        calls, failure = _calls(pl_module, tried.own(), "", training=True in step.modes)
        if calls and not calls[-1].path:
            return calls[-1:]
        parts = calls or parts
        if failure is None:
            break
    if failure is not None and not parts:
        raise CallbackError(
            f"no example inputs, and {step.name} raised {type(failure).__name__} before it called self(...): "
            f"{failure}. Set self.example_input_array in the LightningModule, or pass example_inputs=... to the "
            "callback"
        ) from failure
    return parts


def _hands_on(pl_module: LightningModule, example: Any, call: _Call) -> bool:
    """Whether forward gives what it is given to the same part, as it is."""
    calls, _ = _calls(pl_module, EntryPoint("forward", call_model, example).own(), call.path)
    found = next((one for one in calls if one.path == call.path), None)
    if found is None:
        return False
    given, expected = (tensors_in((one.args, one.kwargs)) for one in (found, call))
    alike = len(given) == len(expected) and all(a.dtype == b.dtype for a, b in zip(given, expected, strict=True))
    return alike and all(map(torch.equal, given, expected))


def _calls(
    pl_module: LightningModule, entry: EntryPoint, until: str, *, training: bool = False
) -> tuple[list[_Call], Exception | None]:
    """The first call of the module and of its parts (not of parts of these), in their order, and what was raised.

    The run ends at the call of this path.
    """
    copied, found = copy_sharing_tensors(pl_module).train(training), list[_Call]()
    with untouched(copied), WritesUndone(copied), _watched(copied, found, until):
        try:
            entry.call(copied, entry.inputs)
        except _Seen:
            pass
        except Exception as error:  # noqa: BLE001 - whatever a user's step may raise
            return found, error
    return found, None


@contextmanager
def _watched(module: nn.Module, found: list[_Call], until: str) -> Iterator[None]:
    handles = []
    for path, part in module.named_modules():

        def note(_: object, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
            if not any(call.path == path or (call.path and path.startswith(f"{call.path}.")) for call in found):
                found.append(_Call(path, *map_tensors(torch.clone, (args, kwargs))))  # a part may work in place
            if path == until:
                raise _Seen

        handles.append(part.register_forward_pre_hook(note, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _as_example(pl_module: LightningModule, call: _Call) -> Any:
    """A tensor, a tuple of positional arguments or a dict of named ones; None if they have to be mixed."""
    _, args, kwargs = call
    if not kwargs:
        return args[0] if len(args) == 1 and isinstance(args[0], Tensor) else args
    signature = inspect.signature(pl_module.forward)
    named: dict[str, Any] = {}
    try:
        arguments = signature.bind(*args, **kwargs).arguments
    except TypeError:  # those of a part, which forward does not take
        return None
    for name, value in arguments.items():
        kind = signature.parameters[name].kind
        if kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            return None
        named |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return named
