"""What the callbacks share: finding each other, example inputs, and what they refuse."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from pytorch_lightning import Callback, LightningModule, Trainer

from lightning_prune.callbacks.processes import check_strategy
from lightning_prune.errors import CallbackError

C = TypeVar("C", bound=Callback)


def predecessor(trainer: Trainer, callback: Callback, kind: type[C]) -> C:
    """The nearest callback of a kind that runs before ``callback``.

    Raises:
        CallbackError: there is none, or it comes later in the list.
    """
    callbacks = list(trainer.callbacks)  # type: ignore[attr-defined]
    before = callbacks[: callbacks.index(callback)]
    found = [other for other in before if isinstance(other, kind)]
    if found:
        return found[-1]
    name, needed = type(callback).__name__, kind.__name__
    later = any(isinstance(other, kind) for other in callbacks)
    raise CallbackError(
        f"{name} needs a {needed} before it in Trainer(callbacks=[...]), "
        + (f"but {needed} comes after it: swap them" if later else "and there is none: add it, or use PruneCallback")
    )


def find(trainer: Trainer, kind: type[C]) -> C | None:
    """The first callback of a kind, if there is one."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)


def check_trainer(trainer: Trainer, callback: Callback) -> None:
    """Refuse Trainers in which pruning would go wrong.

    Raises:
        CallbackError: a strategy that shards or copies the module, or the same callback twice.
    """
    name = type(callback).__name__
    check_strategy(trainer, name)
    callbacks = list(trainer.callbacks)  # type: ignore[attr-defined]
    if sum(type(other) is type(callback) for other in callbacks) > 1:
        raise CallbackError(
            f"Trainer(callbacks=[...]) has {name} twice: they would prune each other's channels. Use one, with a "
            "schedule (Rounds, Gradual) to remove channels in several steps"
        )


def check_before_pruning(trainer: Trainer, callback: Callback, scoring: type[Callback]) -> None:
    """Make sure that a callback meets the dense model: it must run before the one that scores.

    Raises:
        CallbackError: it comes later in the list.
    """
    callbacks = list(trainer.callbacks)  # type: ignore[attr-defined]
    if any(isinstance(other, scoring) for other in callbacks[: callbacks.index(callback)]):
        name = type(callback).__name__
        raise CallbackError(
            f"{name} must see the dense model: put it before PruneCallback (or ScoringCallback) in "
            "Trainer(callbacks=[...])"
        )


def same_module(callback: Callback, before: LightningModule | None, module: LightningModule) -> LightningModule:
    """The module, unless the callback has worked on another one.

    Raises:
        CallbackError: it has.
    """
    if before is not None and before is not module:
        raise CallbackError(
            f"this {type(callback).__name__} was used on another module and holds its scores and plan; make a new one"
        )
    return module


@contextmanager
def uncompiled(module: LightningModule) -> Iterator[None]:
    """The module's own methods, without what ``torch.compile`` put in their place.

    Compiled ones are bound to this module, also in its copies, and their operators are not the module's. They come
    back afterwards and are compiled anew when they meet other shapes.
    """
    compiled = {}
    if getattr(module, "_compiler_ctx", None) is not None:
        names = ("forward", "training_step", "validation_step", "test_step", "predict_step")
        compiled = {name: vars(module).pop(name) for name in names if name in vars(module)}
    try:
        yield
    finally:
        vars(module).update(compiled)


def example_inputs(module: LightningModule, given: Any) -> Any:
    """Inputs to trace with, on the module's device and in the Trainer's precision.

    Raises:
        CallbackError: neither given nor set on the module.
    """
    inputs = module.example_input_array if given is None else given
    if inputs is None:
        raise CallbackError(
            "no example inputs: set self.example_input_array in the LightningModule, or pass example_inputs=... to the "
            "callback (a tensor, a tuple, or a dict, as the module's forward takes them)"
        )
    trainer = module._trainer
    if trainer is not None:
        inputs = trainer.precision_plugin.convert_input(inputs)
    return module._apply_batch_transfer_handler(inputs)
