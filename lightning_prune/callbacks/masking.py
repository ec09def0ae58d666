"""When to mask: as soon as there are scores, at once or step by step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_prune.callbacks.common import check_trainer, example_inputs, predecessor, same_module, uncompiled
from lightning_prune.callbacks.processes import check_same_plan
from lightning_prune.callbacks.scoring import ScoringCallback
from lightning_prune.callbacks.scoring_pass import check_fresh_iterators
from lightning_prune.callbacks.weight_averages import mask_averages_
from lightning_prune.errors import CallbackError, NoEffectWarning
from lightning_prune.graph import ChannelGraph
from lightning_prune.model_state.preservation import copy_sharing_tensors
from lightning_prune.plan import Coupling, Plan, check_coupling
from lightning_prune.reconstruction.masks import MaskHandle, mask_
from lightning_prune.schedule import Schedule, Step, keep_removed, spread
from lightning_prune.selection import GlobalRatio, Selection


class MaskingCallback(Callback):
    """Turns the scores of a `ScoringCallback` into a plan and holds the channels it removes at zero.

    Args:
        selection: which channels go; default ``GlobalRatio(0.5)``.
        coupling: ``joint``, ``union`` or ``intersection``, see `Selection.select`.
        batch_norm: mask batch norms with their filters; False is lossy.
        schedule: `Rounds`, `Gradual` or `Soft`: remove some channels, fine-tune, score again; None: all at once.

    Attributes:
        plan: in the channels of the dense model, once masked; all steps so far.
        built: the part of the plan that the model was already reconstructed with.
        round: how many steps are done.
        handle: the masks in force; `MaskHandle.zeros` says what is held at zero.

    Raises:
        CallbackError: no ScoringCallback before it, or too few epochs for the schedule.
        PlanError: nothing to prune; no weight has been touched then.
    """

    def __init__(
        self,
        selection: Selection | None = None,
        *,
        coupling: Coupling = "joint",
        batch_norm: bool = True,
        schedule: Schedule | None = None,
    ) -> None:
        check_coupling(coupling)
        self.selection = selection if selection is not None else GlobalRatio(0.5)
        self.coupling = coupling
        self.batch_norm = batch_norm
        self.schedule = schedule
        self.round = 0
        self.plan: Plan | None = None
        self.built: Plan | None = None
        self.handle: MaskHandle | None = None
        self._steps: list[Step] = []
        self._resumed_steps, self._held = 0, False
        self._epoch = self._batch = 0  # when the last step was taken
        self._dense: nn.Module | None = None
        self.checks: list[Callable[[Trainer], None]] = []  # of what comes later, before any weight is touched
        self._module: LightningModule | None = None

    @property
    def done(self) -> bool:
        """Whether everything that is to be removed is masked."""
        return self.plan is not None and self.round == len(self._steps)

    @property
    def left(self) -> Plan | None:
        """The plan in the channels of the model as it is now."""
        return self.plan if self.plan is None or self.built is None else self.plan.within(self.built)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            check_trainer(trainer, self)
            predecessor(trainer, self, ScoringCallback)
            self._module = same_module(self, self._module, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._hold_again(trainer, pl_module)
        if self.plan is None:
            self._mask_when_due(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mask_when_due(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._steps and not self.done and self._steps[self.round - 1].epochs == 0:
            self._mask_when_due(trainer, pl_module, batch_idx)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.plan is None:  # what is masked now is not fine-tuned any more
            self._mask_when_due(trainer, pl_module)
        if self._steps and not self.done:
            rank_zero_warn(
                f"training ended after step {self.round} of {len(self._steps)} of {self.schedule!r}: fewer channels "
                "are removed than asked for; train longer (max_epochs, early stopping)",
                category=NoEffectWarning,
            )

    def state_dict(self) -> dict[str, Any]:
        """The plan and how far the schedule has come: plain data."""
        return {
            "plan": None if self.plan is None else self.plan.to_dict(),
            "built": None if self.built is None else self.built.to_dict(),
            "round": self.round,
            "steps": len(self._steps),
            "epoch": self._epoch,
            "batch": self._batch,
            "held": self.handle is not None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there when fitting starts."""
        self.release()
        self._steps = []
        plan, built = state_dict["plan"], state_dict["built"]
        self.plan = None if plan is None else Plan.from_dict(plan)
        self.built = None if built is None else Plan.from_dict(built)
        self.round, self._epoch, self._batch = state_dict["round"], state_dict["epoch"], state_dict["batch"]
        self._resumed_steps, self._held = state_dict["steps"], state_dict["held"]

    def mark_built(self, built: Plan) -> None:
        """The model has been reconstructed; its masks are gone."""
        self.built, self.handle = built, None

    def release(self) -> None:
        """Stop holding masked channels at zero."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    def keep_dense(self, pl_module: LightningModule) -> None:
        """Keep the dense model, for selections that count it, before its first reconstruction."""
        if self._dense is None and self.selection.needs_model and not self.done:
            self._dense = copy_sharing_tensors(pl_module)

    def _hold_again(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After resuming: the steps and the masks, which a checkpoint cannot hold."""
        if self.plan is None or self._steps:
            return
        scoring = predecessor(trainer, self, ScoringCallback)
        if self._held or self.round < self._resumed_steps:
            scoring.retrace(pl_module)
        if scoring.dense_graph is None:  # all is done and built
            self._steps = [Step(self.selection)] * self.round
            return
        self._steps = self._plan_steps(trainer, scoring.dense_graph)
        if len(self._steps) != self._resumed_steps:
            raise CallbackError(
                f"the checkpoint was written with {self._resumed_steps} steps, and {self.selection!r} with "
                f"{self.schedule!r} makes {len(self._steps)}; resume with the settings of the first run"
            )
        if self._held:
            assert scoring.graph is not None
            assert self.left is not None
            self.handle = mask_(pl_module, scoring.graph, self.left, optimizers=trainer.optimizers, undoable=False)

    def _holds_after(self, step: int) -> bool:
        return step == len(self._steps) or self.schedule is None or self.schedule.hold

    def _mask_when_due(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int = 0) -> None:
        scoring = predecessor(trainer, self, ScoringCallback)
        if self.done or scoring.scores is None or not self._due(trainer, batch_idx):
            return
        dense = scoring.dense_graph
        assert dense is not None
        assert scoring.graph is not None
        if not self._steps:
            self._steps = self._plan_steps(trainer, dense)
        if self.round:
            scoring.rescore(trainer, pl_module)
        scores = scoring.scores if self.built is None else spread(scoring.scores, self.built, dense)
        if self.plan is not None and not (self.schedule is not None and self.schedule.soft):
            scores = keep_removed(scores, self.plan)
        selection = self._steps[self.round].selection
        with uncompiled(pl_module):
            plan = selection.select(
                dense,
                scores,
                coupling=self.coupling,
                batch_norm=self.batch_norm,
                model=self._dense or pl_module,
                example_inputs=example_inputs(pl_module, scoring.example_inputs) if selection.needs_model else None,
            )
        check_same_plan(plan)
        for check in self.checks if self.plan is None else ():
            check(trainer)
        self.release()
        left = plan if self.built is None else plan.within(self.built)
        hold = self._holds_after(self.round + 1)
        if not hold:
            left = replace(left, batch_norm=False)  # with gamma and beta at zero a ReLU lets no gradient back
        self.handle = mask_(pl_module, scoring.graph, left, optimizers=trainer.optimizers, undoable=False)
        mask_averages_(trainer, scoring.graph, left)
        self.plan = plan
        self.round += 1
        self._epoch = trainer.current_epoch + (batch_idx > 0)  # whole epochs are counted from the next one on
        self._batch = _batches(trainer)
        if not hold:
            self.release()
        self._say()

    def _due(self, trainer: Trainer, batch_idx: int) -> bool:
        if not self.round:
            return True
        step = self._steps[self.round - 1]
        if step.epochs:
            return batch_idx == 0 and trainer.current_epoch - self._epoch >= step.epochs
        return _batches(trainer) - self._batch >= step.batches

    def _say(self) -> None:
        assert self.plan is not None
        total = sum(group.size * len(group.layers) for group in self.plan.groups.values())
        gone = total - sum(len(kept) for group in self.plan.groups.values() for kept in group.layers.values())
        number = f" (round {self.round} of {len(self._steps)})" if self.schedule is not None else ""
        rank_zero_info(f"Masked {gone:,} of {total:,} channels of all prunable layers{number}")

    def _plan_steps(self, trainer: Trainer, graph: ChannelGraph) -> list[Step]:
        if self.schedule is None:
            return [Step(self.selection)]
        steps = self.schedule.steps(self.selection, graph)
        if any(step.epochs == 0 for step in steps[:-1]):
            check_fresh_iterators(trainer)
        per_epoch = trainer.fit_loop.max_batches
        partly = sum(step.batches for step in steps[:-1] if not step.epochs) / per_epoch if per_epoch else 0.0
        needed = trainer.current_epoch + sum(step.epochs for step in steps[:-1]) + math.floor(partly) + 1
        if trainer.max_epochs is not None and 0 <= trainer.max_epochs < needed and self.plan is None:
            raise CallbackError(
                f"the {len(steps)} steps of {self.schedule!r} need max_epochs of at least {needed}, got "
                f"{trainer.max_epochs}; remove more channels per step, or train longer"
            )
        return steps


def _batches(trainer: Trainer) -> int:
    """How many training batches are done in this run, resumed ones included."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.completed)
