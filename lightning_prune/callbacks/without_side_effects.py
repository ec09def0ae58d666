"""A copy of the module takes part in a Trainer for one step: it logs nowhere, steps no optimizer and moves no state."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.core.optimizer import LightningOptimizer, _configure_optimizers
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.trainer.states import RunningStage
from torch import Tensor


@contextmanager
def attached(model: Any, trainer: Trainer, stage: RunningStage) -> Iterator[None]:
    """Let a copy of the module run a step of its own as in this Trainer, and undo what it does to the Trainer."""
    inner = [module for module in model.modules() if hasattr(module, "log_dict")]  # of either namespace of Lightning
    own = _stand_ins(model)
    loggers, before, stopping = trainer.loggers, trainer.state.stage, trainer.should_stop
    strategy: Any = trainer.strategy
    connected = strategy._lightning_module
    settings = [(group, {k: v for k, v in group.items() if k != "params"}) for group in _parameter_groups(trainer)]
    trainer.loggers = [DummyLogger()] if loggers else []
    trainer.state.stage = stage
    trainer.save_checkpoint = nowhere  # type: ignore[method-assign]
    strategy._lightning_module = model  # trainer.lightning_module
    for module in inner:
        module._trainer = trainer
        vars(module).update(own)
    try:
        with warnings.catch_warnings(), _no_backward_without_gradients():
            warnings.simplefilter("ignore")
            yield
    finally:
        trainer.loggers, trainer.state.stage, trainer.should_stop = loggers, before, stopping
        strategy._lightning_module = connected
        vars(trainer).pop("save_checkpoint", None)
        for group, values in settings:
            group.update(values)  # a learning rate that the step sets
        for module in inner:
            module._trainer = None
            for name in own:
                vars(module).pop(name, None)


def _parameter_groups(trainer: Trainer) -> list[dict[str, Any]]:
    return [group for optimizer in trainer.optimizers for group in optimizer.param_groups]


def nowhere(*_: Any, **__: Any) -> None:
    """Log or save nothing."""


def _stand_ins(model: LightningModule) -> dict[str, Callable[..., Any]]:
    """What a step may call that would change the run."""
    made: list[tuple[list[Any], list[Any]]] = []

    def configured() -> tuple[list[Any], list[Any]]:
        if not made:
            optimizers, schedulers, _ = _configure_optimizers(model.configure_optimizers())  # type: ignore[arg-type]
            plain = [one["scheduler"] if isinstance(one, dict) else one for one in schedulers]
            made.append(([_Still(one) for one in optimizers], plain))
        return made[0]

    def optimizers(use_pl_optimizer: bool = True) -> Any:  # noqa: ARG001
        found = configured()[0]
        return found[0] if len(found) == 1 else found

    def lr_schedulers() -> Any:
        found = configured()[1]
        return found[0] if len(found) == 1 else found or None

    def manual_backward(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward(*args, **kwargs)

    return {
        "log": nowhere,
        "log_dict": nowhere,
        "optimizers": optimizers,
        "lr_schedulers": lr_schedulers,
        "manual_backward": manual_backward,
        "toggle_optimizer": nowhere,
        "untoggle_optimizer": nowhere,
        "clip_gradients": nowhere,
    }


class _Still(LightningOptimizer):
    """An optimizer that runs closures and changes no weight."""

    def step(self, closure: Callable[[], Any] | None = None, **_: Any) -> Any:
        return None if closure is None else closure()

    def toggle_model(self, sync_grad: bool = True) -> Any:
        return nullcontext()


@contextmanager
def _no_backward_without_gradients() -> Iterator[None]:
    """``loss.backward()`` does nothing where gradients are off, as while tracing."""
    backward = Tensor.backward

    def maybe(tensor: Tensor, *args: Any, **kwargs: Any) -> None:
        if torch.is_grad_enabled() and tensor.requires_grad:
            backward(tensor, *args, **kwargs)

    Tensor.backward = maybe  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Tensor.backward = backward  # type: ignore[method-assign]
