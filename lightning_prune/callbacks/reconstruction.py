"""When to reconstruct: before fine-tuning (order B), after every step of a schedule, or after training (order A)."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, Literal

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info

from lightning_prune.callbacks.checkpoint_shapes import CheckpointShapes
from lightning_prune.callbacks.module import uncompiled
from lightning_prune.callbacks.processes import (
    check_communication_hook,
    check_same_plan,
    check_strategy,
    failing_together,
    unwrapped,
)
from lightning_prune.callbacks.run import PruningRun, join, resumes
from lightning_prune.callbacks.timing import EpochTimerCallback
from lightning_prune.callbacks.weight_averages import averages
from lightning_prune.errors import CallbackError, check_choice
from lightning_prune.measure import count_params
from lightning_prune.model_state.optimizer_state import check_attributes, check_sliceable, unwrap
from lightning_prune.reconstruction import LosslessReport

When = Literal["before", "during", "after"]


class ReconstructionCallback(EpochTimerCallback):
    """Replaces the masked model by the physically smaller one, in place, and records what an epoch costs.

    Optimizers keep working: parameters stay the same objects and their state is cut along. So are averages of the
    weights that Lightning's callbacks keep; DistributedDataParallel wraps the smaller model anew. The result is
    compared with the masked model in float64; if they differ, everything is put back and `ReconstructionError` raised.
    Lightning checkpoints carry the plan, so that a freshly built dense module takes the shapes of the file it resumes,
    validates or tests from.

    Args:
        when: ``before``: as soon as all is masked, so that fine-tuning is cheap (order B); zero filters that an
            addition keeps train again. ``during``: after every step of a schedule. ``after``: when training ends
            (order A).
        monitor: metric recorded with every epoch, e.g. "val_acc".

    Raises:
        CallbackError: no MaskingCallback before it, an unknown moment, or a `Soft` schedule with ``during``.
        OptimizerError: the optimizer's state cannot be cut along.
        ReconstructionError: the smaller model is not equal to the masked one.
        CheckpointError: a checkpoint of another model; both shapes are named.

    Example:
        >>> ReconstructionCallback("after").order
        'A'
    """

    def __init__(self, when: When = "before", *, monitor: str | None = None) -> None:
        check_choice("when", when, When, CallbackError)
        super().__init__(monitor=monitor)
        self.when = when
        self.run: PruningRun | None = None
        self._shapes = CheckpointShapes()

    @property
    def order(self) -> str:
        """A: prune, fine-tune, reconstruct. B: prune, reconstruct, fine-tune."""
        return "A" if self.when == "after" else "B"

    @property
    def lossless(self) -> LosslessReport | None:
        """The comparison, once reconstructed; of several the one with the largest error."""
        return None if self.run is None else self.run.lossless

    @property
    def seconds(self) -> float | None:
        """What reconstruction took, all steps together."""
        return None if self.run is None else self.run.seconds

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            check_strategy(trainer, type(self).__name__)
        self.run = join(trainer, self, after="MaskingCallback")
        self.run.timer = self
        self.run.checks.append(self._check_optimizers)
        self.run.reconstructs = True
        schedule = self.run.session.schedule
        if stage == "fit":
            _check_other_masks(trainer, self.when)
        if stage == "fit" and self.when == "during" and schedule is not None and schedule.soft:
            raise CallbackError(
                f"{schedule!r} chooses among all channels every time, so none may be gone before the last: use "
                "reconstruct='before' (right after the last choice) or 'after'"
            )
        self._shapes.watch(trainer, self.run.session)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._shapes.forget(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._shapes.forget(trainer)  # Lightning tears down nothing then

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reconstruct_when_masked(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reconstruct_when_masked(trainer, pl_module)
        super().on_train_epoch_start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._reconstruct_when_masked(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reconstruct_when_masked(trainer, pl_module, last=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run.at_last(trainer, pl_module, self.on_train_end)

    def state_dict(self) -> dict[str, Any]:
        """Timings and the comparison: plain data."""
        lossless = None if self.lossless is None else asdict(self.lossless)
        return {**super().state_dict(), "lossless": lossless, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        super().load_state_dict(state_dict)
        lossless = state_dict["lossless"]
        self._run.lossless = None if lossless is None else LosslessReport(**lossless)
        self._run.seconds = state_dict["seconds"]

    @property
    def _run(self) -> PruningRun:
        assert self.run is not None, "setup comes first"
        return self.run

    def _check_optimizers(self, trainer: Trainer) -> None:
        """They may have state by the time the model is cut."""
        if self.when != "after":
            check_attributes(unwrap(trainer.optimizers))
        started = trainer.global_step > 0 or resumes(trainer)
        while_training = self._run.session.schedule is not None or started
        if self.when == "after" or while_training:
            check_sliceable(unwrap(trainer.optimizers))
        if self.when != "after" and while_training:
            check_communication_hook(trainer)

    def _reconstruct_when_masked(self, trainer: Trainer, pl_module: LightningModule, last: bool = False) -> None:
        run, session = self._run, self._run.session
        too_early = self.when == "after" or (self.when == "before" and not session.done)
        if session.handle is None or (too_early and not last):
            return
        before, started = count_params(pl_module), time.perf_counter()
        self._shapes.remember(pl_module)
        with unwrapped(trainer, pl_module), failing_together(), uncompiled(pl_module):
            report = session.reconstruct_(optimizers=trainer.optimizers, copies=averages(trainer))
        assert session.built is not None
        # Channels whose removal changed a result stay, and each process compared on batches of its own.
        check_same_plan(session.built, "Their models are of different shapes now")
        if run.lossless is None or report.max_rel_error >= run.lossless.max_rel_error:
            run.lossless = report
        seconds = time.perf_counter() - started
        run.seconds = seconds + (run.seconds or 0.0)
        rank_zero_info(
            f"Reconstructed in {seconds:.2f} s: {before:,} to {count_params(pl_module):,} parameters; "
            f"{'lossless' if report.passed else 'NOT lossless'}, relative error {report.max_rel_error:.1e} against the "
            f"masked model in {report.dtype} ({', '.join(report.compared)})"
        )


def _check_other_masks(trainer: Trainer, when: When) -> None:
    """Refuse Lightning's own ModelPruning where its masks, of the dense shapes, would meet the smaller model."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    others = [place for place, one in enumerate(callbacks) if "ModelPruning" in {t.__name__ for t in type(one).__mro__}]
    ours = next((place for place, one in enumerate(callbacks) if prunes([one])), -1)
    if any(when != "after" or place > ours for place in others):
        raise CallbackError(
            "ModelPruning puts masks of torch.nn.utils.prune on tensors of the dense model until training ends: they "
            "do not become smaller with it. Use reconstruct='after' (ReconstructionCallback('after')) and put "
            "ModelPruning before it in Trainer(callbacks=[...]), or use it in a fit of its own"
        )


def prunes(callbacks: Iterable[Callback]) -> bool:
    """Whether one of a Trainer's callbacks makes the model smaller; `PruneCallback` holds the one that does."""
    return any(isinstance(getattr(part, "reconstruction", part), ReconstructionCallback) for part in callbacks)
