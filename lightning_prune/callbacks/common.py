"""What the callbacks share: finding each other, example inputs, and what they refuse."""

from __future__ import annotations

from typing import Any, TypeVar

from pytorch_lightning import Callback, LightningModule, Trainer

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


def check_trainer(trainer: Trainer, callback: Callback) -> None:
    """Refuse Trainers in which pruning would go wrong.

    Raises:
        CallbackError: several processes.
    """
    name = type(callback).__name__
    if trainer.world_size > 1:
        raise CallbackError(
            f"{name}: pruning with {trainer.world_size} processes is not supported yet; use devices=1, num_nodes=1"
        )


def check_not_resumed(trainer: Trainer, callback: Callback) -> None:
    """Refuse to prune on top of a restored run; Lightning tells of it only once the weights are loaded.

    Raises:
        CallbackError: ``fit`` was called with a checkpoint.
    """
    if trainer.ckpt_path is not None:
        raise CallbackError(
            f"{type(callback).__name__}: resuming with ckpt_path={str(trainer.ckpt_path)!r} is not supported yet. Load "
            "the dense weights into the module first, or load a pruned file with lightning_prune.load and fit without "
            "pruning callbacks"
        )


def example_inputs(module: LightningModule, given: Any) -> Any:
    """Inputs to trace with, on the module's device.

    Raises:
        CallbackError: neither given nor set on the module.
    """
    inputs = module.example_input_array if given is None else given
    if inputs is None:
        raise CallbackError(
            "no example inputs: set self.example_input_array in the LightningModule, or pass example_inputs=... to the "
            "callback (a tensor, a tuple, or a dict, as the module's forward takes them)"
        )
    return module._apply_batch_transfer_handler(inputs)
