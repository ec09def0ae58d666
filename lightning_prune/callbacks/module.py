"""The module in a Trainer: whether it is the same, without torch.compile, what it is traced with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn

from lightning_prune.errors import CallbackError


def same_module(callback: Callback, before: object, module: LightningModule) -> None:
    """Refuse another module than the one that the callback has worked on."""
    if before is not module:
        raise CallbackError(
            f"this {type(callback).__name__} was used on another module and holds its scores and plan; make a new one"
        )


@contextmanager
def uncompiled(module: nn.Module) -> Iterator[None]:
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


def in_precision(module: nn.Module) -> None:
    """Give the module the type of the Trainer's precision, as Lightning does once it has restored a checkpoint.

    Steps and inputs have it already, so that a trace before that would mix two types.
    """
    trainer: Trainer | None = getattr(module, "_trainer", None)
    if trainer is not None:
        trainer.precision_plugin.convert_module(module)


def example_inputs(module: LightningModule, given: Any) -> Any:
    """Inputs to trace with, on the module's device and in the Trainer's precision."""
    inputs = module.example_input_array if given is None else given
    if inputs is None:
        raise CallbackError(
            "no example inputs, and no training_step that calls self(...), or the part that forward hands its input "
            "to: set self.example_input_array in the LightningModule, or pass example_inputs=... to the callback (a "
            "tensor, a tuple, or a dict, as the module's forward takes them). Data that can be read only once are not "
            "looked at"
        )
    trainer = module._trainer
    if trainer is not None:
        inputs = trainer.precision_plugin.convert_input(inputs)
    return module._apply_batch_transfer_handler(inputs)
