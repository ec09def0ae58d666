"""A copy of the module takes part in a Trainer for one step: it logs nowhere, steps no optimizer and moves no state."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.core.optimizer import LightningOptimizer, _configure_optimizers
from pytorch_lightning.loggers.logger import DummyLogger
from pytorch_lightning.trainer.states import RunningStage
from pytorch_lightning.utilities import CombinedLoader
from torch import Tensor

from lightning_prune.callbacks.first_batches import untouched_loaders


@contextmanager
def attached(model: Any, trainer: Trainer, stage: RunningStage, loaders: Loaders | None = None) -> Iterator[None]:
    """Let a copy of the module run a step of its own as in this Trainer, and undo what it does to the Trainer.

    loaders: what the Trainer answers where it has set up none yet.
    """
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
            with nullcontext() if loaders is None else loaders.shown(stage):
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


class Loaders:
    """The loaders of a fit, for steps that ask the Trainer for them before Lightning has set them up.

    Made once, and where a method of the user's makes them only when a step asks: it may take long. No data are read.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer: Any = trainer
        self._made: dict[Any, CombinedLoader] = {}

    @contextmanager
    def shown(self, stage: RunningStage) -> Iterator[None]:
        """Inside, the loops of training and validation have them; that of a test or a prediction has validation's."""
        trainer, train = self._trainer, self._trainer.fit_loop
        val = train.epoch_loop.val_loop
        limits = {train: trainer.limit_train_batches, val: trainer.limit_val_batches}
        found = [loop for loop in limits if limits[loop] and loop._data_source.is_defined()]
        other = {RunningStage.TESTING: trainer.test_loop, RunningStage.PREDICTING: trainer.predict_loop}.get(stage)
        sources = {loop: loop for loop in found} | ({other: found[-1]} if other is not None and found else {})
        with ExitStack() as kept:
            kept.callback(self._put_back, train.max_batches, val._max_batches)
            for loop, source in sources.items():
                if loop._combined_loader is None:
                    loop._combined_loader = stand_in = _StandIn(partial(self._of, source, limits[source], kept))
                    kept.callback(self._take_away, loop, stand_in)
                    if loop is source and not source._data_source.is_module():
                        stand_in.flattened  # noqa: B018 - counted at once
            yield

    def _of(self, loop: Any, limit: float, kept: ExitStack) -> Any:
        if not isinstance(loop._combined_loader, _StandIn):
            return loop._combined_loader
        training = loop is self._trainer.fit_loop
        if loop not in self._made:
            given: Any = loop._data_source.dataloader()
            mode: Any = "max_size_cycle" if training else "sequential"
            self._made[loop] = given if hasattr(given, "flattened") else CombinedLoader(given, mode)
        made = self._made[loop]
        kept.enter_context(untouched_loaders(made.flattened))  # a step may read them
        counts = [_count(loader, limit) for loader in made.flattened]
        if not training:
            loop._max_batches = counts
        elif counts:
            loop.max_batches = min(counts) if made._mode == "min_size" else max(counts)
        return made

    @staticmethod
    def _take_away(loop: Any, stand_in: Any) -> None:
        if loop._combined_loader is stand_in:
            loop._combined_loader = None

    def _put_back(self, of_training: Any, of_validation: Any) -> None:
        train = self._trainer.fit_loop
        if train._combined_loader is None:
            train.max_batches = of_training
        if train.epoch_loop.val_loop._combined_loader is None:
            train.epoch_loop.val_loop._max_batches = of_validation


class _StandIn:
    """In place of the combined loader of a loop that has none yet."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    def __getattr__(self, name: str) -> Any:
        return getattr(self._make(), name)


def _count(loader: Any, limit: float) -> float:
    """How many batches the Trainer takes of a loader."""
    try:
        length: float = len(loader)
    except (TypeError, NotImplementedError):
        length = math.inf
    if isinstance(limit, int):
        return min(length, limit)
    return length if length == math.inf else int(length * limit)


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
