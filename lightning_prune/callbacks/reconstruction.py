"""When to reconstruct: before fine-tuning (order B), after every step of a schedule, or after training (order A)."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import Any, Literal, get_args

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info

from lightning_prune.callbacks.checkpoint_shapes import Shapes
from lightning_prune.callbacks.common import check_trainer, example_inputs, predecessor, uncompiled
from lightning_prune.callbacks.masking import MaskingCallback
from lightning_prune.callbacks.processes import unwrapped
from lightning_prune.callbacks.scoring import ScoringCallback
from lightning_prune.callbacks.timing import EpochTimerCallback
from lightning_prune.callbacks.weight_averages import reconstruct_averages_
from lightning_prune.errors import CallbackError
from lightning_prune.measure import count_params
from lightning_prune.model_state.optimizer_state import check_sliceable, unwrap
from lightning_prune.plan import GroupPlan, Plan
from lightning_prune.reconstruction.lossless import LosslessReport
from lightning_prune.reconstruction.small_model import reconstruct_

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
        example_inputs: what to compare on; None: the module's ``example_input_array``.
        monitor: metric recorded with every epoch, e.g. "val_acc".

    Attributes:
        lossless: the comparison, once reconstructed; of several the one with the largest error.
        seconds: what reconstruction took, all steps together.
        records: wall time of every epoch, evaluation apart (from `EpochTimerCallback`).

    Raises:
        CallbackError: no MaskingCallback before it, an unknown moment, or a `Soft` schedule with ``during``.
        OptimizerError: the optimizer's state cannot be cut along.
        ReconstructionError: the smaller model is not equal to the masked one.
        CheckpointError: a checkpoint of another model; both shapes are named.
    """

    def __init__(self, when: When = "before", *, example_inputs: Any = None, monitor: str | None = None) -> None:
        if when not in get_args(When):
            raise CallbackError(f"when must be one of {', '.join(get_args(When))}, got {when!r}")
        super().__init__(monitor=monitor)
        self.when = when
        self.example_inputs = example_inputs
        self.lossless: LosslessReport | None = None
        self.seconds: float | None = None
        self.shapes = Shapes()

    @property
    def order(self) -> str:
        """A: prune, fine-tune, reconstruct. B: prune, reconstruct, fine-tune."""
        return "A" if self.when == "after" else "B"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            check_trainer(trainer, self)
            masking = predecessor(trainer, self, MaskingCallback)
            if self.when == "during" and masking.schedule is not None and masking.schedule.soft:
                raise CallbackError(
                    f"{masking.schedule!r} chooses among all channels every time, so none may be gone before the last: "
                    "use reconstruct='before' (right after the last choice) or 'after'"
                )
            masking.checks = [self._check_optimizers]
        self.shapes.watch(trainer, self)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.shapes.forget(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reconstruct_when_masked(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reconstruct_when_masked(trainer, pl_module)
        super().on_train_epoch_start(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._reconstruct_when_masked(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reconstruct_when_masked(trainer, pl_module, last=True)

    def state_dict(self) -> dict[str, Any]:
        """Timings and the comparison: plain data."""
        return {
            **super().state_dict(),
            "lossless": None if self.lossless is None else asdict(self.lossless),
            "seconds": self.seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        super().load_state_dict(state_dict)
        self.lossless = None if state_dict["lossless"] is None else LosslessReport(**state_dict["lossless"])
        self.seconds = state_dict["seconds"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        masking = predecessor(trainer, self, MaskingCallback)
        self.shapes.save(pl_module, masking.built, checkpoint)

    def _check_optimizers(self, trainer: Trainer) -> None:
        """They may have state by the time the model is cut."""
        started = trainer.global_step > 0 or trainer.ckpt_path is not None
        scheduled = predecessor(trainer, self, MaskingCallback).schedule is not None
        if self.when == "after" or scheduled or started:
            check_sliceable(unwrap(trainer.optimizers))

    def _reconstruct_when_masked(self, trainer: Trainer, pl_module: LightningModule, last: bool = False) -> None:
        masking = predecessor(trainer, self, MaskingCallback)
        if masking.handle is None:
            return
        if not last and (self.when == "after" or (self.when == "before" and not masking.done)):
            return
        left = masking.left
        assert left is not None
        scoring = predecessor(trainer, self, ScoringCallback)
        assert scoring.graph is not None
        assert masking.plan is not None
        before = count_params(pl_module)
        started = time.perf_counter()
        self.shapes.remember(pl_module)
        with unwrapped(trainer, pl_module), uncompiled(pl_module):
            masking.keep_dense(pl_module)
            masking.handle.remove()
            report = reconstruct_(
                pl_module,
                scoring.graph,
                left,
                optimizers=trainer.optimizers,
                example_inputs=example_inputs(pl_module, self.example_inputs),
            )
            assert report is not None
            cut = {name: group for name, group in left.groups.items() if name not in report.left}
            reconstruct_averages_(trainer, scoring.graph, replace(left, groups=cut))
        masking.mark_built(_without(masking.plan, report, masking.built))
        if not masking.done:
            scoring.retrace(pl_module)
        if self.lossless is None or report.max_rel_error >= self.lossless.max_rel_error:
            self.lossless = report
        seconds = time.perf_counter() - started
        self.seconds = seconds + (self.seconds or 0.0)
        rank_zero_info(
            f"Reconstructed in {seconds:.2f} s: {before:,} to {count_params(pl_module):,} parameters; "
            f"{'lossless' if report.passed else 'NOT lossless'}, relative error {report.max_rel_error:.1e} against the "
            f"masked model in {report.dtype}"
        )


def _without(plan: Plan, report: LosslessReport, before: Plan | None) -> Plan:
    """What of a plan was built: groups that the model's code needs whole have the channels they had before."""
    whole = {name: tuple(range(group.size)) for name, group in plan.groups.items()}
    had = {**whole, **({} if before is None else {name: group.keep for name, group in before.groups.items()})}
    groups = {name: GroupPlan(plan.groups[name].size, had[name]) for name in report.left}
    return replace(plan, groups={**plan.groups, **groups})
