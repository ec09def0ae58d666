"""What the pruning callbacks of one Trainer share: they meet on the run, not on each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from pytorch_lightning import Callback, LightningModule, Trainer

from lightning_prune.callbacks.first_batches import Batches, first_batches
from lightning_prune.callbacks.module import example_inputs
from lightning_prune.callbacks.random_state import RandomStateCallback
from lightning_prune.callbacks.seen_inputs import seen_inputs
from lightning_prune.callbacks.user_steps import user_steps
from lightning_prune.errors import CallbackError
from lightning_prune.graph.entry_points import EntryPoint
from lightning_prune.reconstruction import LosslessReport
from lightning_prune.session import PruningSession

if TYPE_CHECKING:
    from lightning_prune.callbacks.timing import EpochTimerCallback


@dataclass(eq=False)
class PruningRun:
    """A session inside a Trainer.

    Attributes:
        session: what is pruned, and how far.
        scored_in: the epoch of each of the session's scores.
        epoch: the first epoch after the last step.
        batch: how many batches were done at the last step.
        checks: run before any weight is touched.
        lossless: the comparison after reconstruction; of several the one with the largest error.
        seconds: what reconstruction took, all steps together.
        timer: knows what epochs take without pruning itself.
        joined: names of the callback types that take part.
        reconstructs: whether the model becomes smaller, so that this is rehearsed before it is masked.
        batches: what the user's own steps are traced and rehearsed on.
        seen: what forward was given there, where no example was set.
        trains: whether this fit has begun to train.
    """

    session: PruningSession
    scored_in: list[int] = field(default_factory=list)
    epoch: int = 0
    batch: int = 0
    checks: list[Callable[[Trainer], None]] = field(default_factory=list)
    lossless: LosslessReport | None = None
    seconds: float | None = None
    timer: EpochTimerCallback | None = None
    joined: list[str] = field(default_factory=list)
    reconstructs: bool = False
    batches: Batches | None = None
    seen: Any = None
    trains: bool = False

    def steps(self, pl_module: LightningModule) -> list[EntryPoint]:
        """The user's own steps, on the first batches of this fit, which are kept: later traces see the same."""
        trainer = pl_module._trainer
        if trainer is None or trainer.state.fn != "fit":
            return []
        if self.batches is None:
            self.batches = first_batches(trainer, pl_module)
        return user_steps(trainer, pl_module, self.batches)

    def example_inputs(self, pl_module: LightningModule, given: Any) -> Any:
        """Those that were given, the module's own, or what its training step gives to forward in this fit.

        Raises:
            CallbackError: there are none.
        """
        if given is None and pl_module.example_input_array is None:
            if self.seen is None:
                self.seen = seen_inputs(pl_module, self.steps(pl_module))
            if self.seen is not None:
                return self.seen
        return example_inputs(pl_module, given)

    def open(self, trainer: Trainer, callback: Callback) -> None:
        """Become the run of this Trainer."""
        if RUNS.setdefault(trainer, self) is not self:
            raise CallbackError(twice(callback))
        self.checks.clear()
        self.reconstructs = self.trains = False
        self.joined[:] = [type(callback).__name__]

    def at_last(
        self, trainer: Trainer, pl_module: LightningModule, step: Callable[[Trainer, LightningModule], None]
    ) -> None:
        """Take the step of the end of training now, at the end of a fit that had nothing left to train.

        Resumed from the checkpoint of its last epoch, a fit calls no ``on_train_end``.
        """
        if not self.trains:
            with _as_after_training(trainer, pl_module):
                step(trainer, pl_module)

    def due(self, trainer: Trainer, batch_idx: int = 0) -> bool:
        """Whether a further step of the schedule is to be taken now."""
        session = self.session
        if session.plan is None or session.done:
            return False
        step = session.steps[session.taken - 1]
        if step.epochs:
            return batch_idx == 0 and trainer.current_epoch - self.epoch >= step.epochs
        return batches_done(trainer) - self.batch >= step.batches

    def stepped(self, trainer: Trainer, batch_idx: int) -> None:
        """Note when a step was taken; whole epochs are counted from the next one on."""
        self.epoch = trainer.current_epoch + (batch_idx > 0)
        self.batch = batches_done(trainer)


RUNS: WeakKeyDictionary[Trainer, PruningRun] = WeakKeyDictionary()


def join(trainer: Trainer, callback: Callback, after: str) -> PruningRun:
    """Take part in the run of this Trainer, which a `ScoringCallback` has opened."""
    run = RUNS.get(trainer)
    joined = [] if run is None else run.joined
    if run is None or after not in joined:
        others = [type(other).__name__ for other in trainer.callbacks]  # type: ignore[attr-defined]
        way_out = (
            f"but {after} comes after it: swap them"
            if after in others
            else "and there is none: add it, or use PruneCallback"
        )
        raise CallbackError(
            f"{type(callback).__name__} needs a {after} before it in Trainer(callbacks=[...]), {way_out}"
        )
    if type(callback).__name__ in joined:
        raise CallbackError(twice(callback))
    joined.append(type(callback).__name__)
    return run


def check_before_pruning(trainer: Trainer, callback: Callback) -> None:
    """Make sure that a callback meets the dense model: it must run before the one that scores."""
    if trainer in RUNS:
        raise CallbackError(
            f"{type(callback).__name__} must see the dense model: put it before PruneCallback (or ScoringCallback) in "
            "Trainer(callbacks=[...])"
        )


def resumes(trainer: Trainer) -> bool:
    """Whether the state of training is still to come from a checkpoint, and with it that of the optimizers.

    ``trainer.ckpt_path`` does not say: finders of learning rates and batch sizes leave their own, long done with.
    """
    return bool(trainer._checkpoint_connector._loaded_checkpoint)


def batches_done(trainer: Trainer) -> int:
    """How many training batches are done in this run, resumed ones included."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.completed)


@contextmanager
def _as_after_training(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Random numbers, shuffling and device as the last epoch left them; Lightning ends with the module on the CPU."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        part = getattr(callback, "random_state", callback)
        if isinstance(part, RandomStateCallback):
            part.on_fit_start(trainer, pl_module)  # once more: setting up the data has drawn a seed
    combined: Any = trainer.fit_loop._combined_loader
    epochs: Any = trainer.fit_loop.epoch_progress.current
    for loader in () if combined is None else combined.flattened:
        for sampler in (
            getattr(loader, "sampler", None),
            getattr(getattr(loader, "batch_sampler", None), "sampler", None),
        ):
            if callable(set_epoch := getattr(sampler, "set_epoch", None)):
                set_epoch(max(0, epochs.started - 1))
    before = pl_module.device
    pl_module.to(trainer.strategy.root_device)
    try:
        yield
    finally:
        pl_module.to(before)


def twice(callback: Callback) -> str:
    """What is said where two callbacks would do the same."""
    return (
        f"Trainer(callbacks=[...]) has {type(callback).__name__} twice: they would prune each other's channels. Use "
        "one, with a schedule (Rounds, Gradual) to remove channels in several steps, and LayerRatio(overrides=...) "
        "or ignore=... for parts of the module that lose more, less or nothing"
    )
