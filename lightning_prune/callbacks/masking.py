"""When to mask: as soon as there are scores, at once or step by step."""

from __future__ import annotations

import math
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn

from lightning_prune.callbacks.module import uncompiled
from lightning_prune.callbacks.processes import check_same_plan, check_strategy, failing_together, of_the_first
from lightning_prune.callbacks.run import PruningRun, join
from lightning_prune.callbacks.train_mode import EvalModeCheck
from lightning_prune.callbacks.weight_averages import averages
from lightning_prune.errors import CallbackError, NoEffectWarning
from lightning_prune.plan import Coupling, Plan, check_coupling, filters_masked
from lightning_prune.reconstruction import MaskHandle
from lightning_prune.schedule import Schedule
from lightning_prune.selection import GlobalRatio, Selection, selection_from


class MaskingCallback(Callback):
    """Turns the scores of a `ScoringCallback` into a plan and holds the channels it removes at zero.

    Args:
        selection: which channels go; default ``GlobalRatio(0.5)``. Or a plan of the dense model, to carry it out.
        coupling: ``joint``, ``union`` or ``intersection``, see `Selection.select`.
        batch_norm: mask batch norms with their filters; False is lossy.
        schedule: `lightning_prune.schedule.Rounds`, ``Gradual`` or ``Soft``: remove some channels, fine-tune, score
            again; None: all at once.

    Raises:
        CallbackError: no ScoringCallback before it, or too few epochs for the schedule.
        PlanError: nothing to prune; no weight has been touched then.

    Example:
        >>> from lightning_prune.selection import LayerRatio
        >>> MaskingCallback(LayerRatio(0.3)).selection.ratio
        0.3
    """

    def __init__(
        self,
        selection: Selection | Plan | None = None,
        *,
        coupling: Coupling = "joint",
        batch_norm: bool = True,
        schedule: Schedule | None = None,
    ) -> None:
        check_coupling(coupling)
        self.selection = GlobalRatio(0.5) if selection is None else selection_from(selection)
        self.coupling = coupling
        self.batch_norm = batch_norm
        self.schedule = schedule
        self.run: PruningRun | None = None
        self._modes = EvalModeCheck()

    @property
    def plan(self) -> Plan | None:
        """What is masked or gone, all steps so far, in the channels of the dense model."""
        return None if self.run is None else self.run.session.plan

    @property
    def built(self) -> Plan | None:
        """The part of the plan that the model was already reconstructed with."""
        return None if self.run is None else self.run.session.built

    @property
    def round(self) -> int:
        """How many steps are done."""
        return 0 if self.run is None else self.run.session.taken

    @property
    def done(self) -> bool:
        """Whether everything that is to be removed is masked."""
        return self.run is not None and self.run.session.done

    @property
    def handle(self) -> MaskHandle | None:
        """The masks in force; `MaskHandle.zeros` says what is held at zero."""
        return None if self.run is None else self.run.session.handle

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            check_strategy(trainer, type(self).__name__)
        self.run = join(trainer, self, after="ScoringCallback")
        session = self.run.session
        session.selection, session.schedule = self.selection.named(pl_module), self.schedule
        session.coupling, session.batch_norm = self.coupling, self.batch_norm

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._modes.note(pl_module)
        self._mask_when_scored(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run.trains = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mask_when_scored(trainer, pl_module)
        self._mask_when_due(trainer, pl_module, 0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._mask_when_due(trainer, pl_module, batch_idx)
        if self.plan is not None:
            self._modes.warn(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mask_when_scored(trainer, pl_module)  # it is not fine-tuned any more
        session = self._run.session
        if session.plan is not None and not session.done:
            rank_zero_warn(
                f"training ended after step {session.taken} of {len(session.steps)} of {self.schedule!r}: fewer "
                "channels are removed than asked for; train longer (max_epochs, early stopping)",
                category=NoEffectWarning,
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run.at_last(trainer, pl_module, self.on_train_end)

    @property
    def _run(self) -> PruningRun:
        assert self.run is not None, "setup comes first"
        return self.run

    def _mask_when_scored(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._run.session.plan is None and self._run.session.scores is not None:
            self._check_time(trainer)
            self._mask(trainer, pl_module, 0)

    def _mask_when_due(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        if self._run.due(trainer, batch_idx):
            self._mask(trainer, pl_module, batch_idx)

    def _mask(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        session = self._run.session
        with uncompiled(pl_module):
            plan = of_the_first(session.select) if session.selection.measures_time else self._select()
            check_same_plan(plan)
            with failing_together():
                for check in self._run.checks if session.plan is None else ():
                    check(trainer)
                session.mask_(
                    plan, optimizers=trainer.optimizers, copies=averages(trainer), rehearsed=self._run.reconstructs
                )
        self._run.stepped(trainer, batch_idx)
        gone, total = filters_masked(session.dense_graph, plan)
        number = f" (round {session.taken} of {len(session.steps)})" if self.schedule is not None else ""
        rank_zero_info(f"Masked {gone:,} of {total:,} channels of all prunable layers{number}")

    def _select(self) -> Plan:
        with failing_together():
            return self._run.session.select()

    def _check_time(self, trainer: Trainer) -> None:
        """Refuse a schedule that training cannot follow to its end."""
        steps = self._run.session.steps
        per_epoch = trainer.fit_loop.max_batches
        partly = sum(step.batches for step in steps[:-1] if not step.epochs) / per_epoch if per_epoch else 0.0
        needed = trainer.current_epoch + sum(step.epochs for step in steps[:-1]) + math.floor(partly) + 1
        if self.schedule is not None and trainer.max_epochs is not None and 0 <= trainer.max_epochs < needed:
            raise CallbackError(
                f"the {len(steps)} steps of {self.schedule!r} need max_epochs of at least {needed}, got "
                f"{trainer.max_epochs}; remove more channels per step, or train longer"
            )
