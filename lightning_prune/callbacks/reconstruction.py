"""When to reconstruct: before fine-tuning (order B) or after it (order A)."""

from __future__ import annotations

import time
from typing import Any, Literal, get_args

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info

from lightning_prune.callbacks.common import check_trainer, example_inputs, predecessor
from lightning_prune.callbacks.masking import MaskingCallback
from lightning_prune.callbacks.scoring import ScoringCallback
from lightning_prune.callbacks.timing import EpochTimer
from lightning_prune.equivalence import LosslessReport
from lightning_prune.errors import CallbackError
from lightning_prune.measurement import count_params
from lightning_prune.reconstruction import reconstruct_

When = Literal["before", "after"]


class ReconstructionCallback(EpochTimer):
    """Replaces the masked model by the physically smaller one, in place, and records what an epoch costs.

    Optimizers keep working: parameters stay the same objects and their state is cut along. The result is compared
    with the masked model in float64; if they differ, everything is put back and `ReconstructionError` raised.

    Args:
        when: ``before``: as soon as masked, so that fine-tuning is cheap (order B); zero filters that an addition
            keeps train again. ``after``: when training ends (order A).
        example_inputs: what to compare on; None: the module's ``example_input_array``.
        monitor: metric recorded with every epoch, e.g. "val_acc".

    Attributes:
        lossless: the comparison, once reconstructed.
        seconds: what reconstruction took.
        records: wall time of every epoch, evaluation apart (from `EpochTimer`).

    Raises:
        CallbackError: no MaskingCallback before it, or an unknown moment.
        ReconstructionError: the smaller model is not equal to the masked one.
    """

    def __init__(self, when: When = "before", *, example_inputs: Any = None, monitor: str | None = None) -> None:
        if when not in get_args(When):
            raise CallbackError(f"when must be one of {', '.join(get_args(When))}, got {when!r}")
        super().__init__(monitor=monitor)
        self.when = when
        self.example_inputs = example_inputs
        self.lossless: LosslessReport | None = None
        self.seconds: float | None = None

    @property
    def order(self) -> str:
        """A: prune, fine-tune, reconstruct. B: prune, reconstruct, fine-tune."""
        return "B" if self.when == "before" else "A"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            check_trainer(trainer, self)
            predecessor(trainer, self, MaskingCallback)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.when == "before":
            self._reconstruct_when_masked(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if self.when == "before":
            self._reconstruct_when_masked(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.when == "after":
            self._reconstruct_when_masked(trainer, pl_module)

    def _reconstruct_when_masked(self, trainer: Trainer, pl_module: LightningModule) -> None:
        masking = predecessor(trainer, self, MaskingCallback)
        graph = predecessor(trainer, self, ScoringCallback).graph
        if self.lossless is not None or masking.plan is None or masking.handle is None or graph is None:
            return
        if self.when == "before" and not masking.done:
            return
        inputs = example_inputs(pl_module, self.example_inputs)
        dense = count_params(pl_module)
        started = time.perf_counter()
        masking.handle.remove()
        self.lossless = reconstruct_(
            pl_module, graph, masking.plan, optimizers=trainer.optimizers, example_inputs=inputs
        )
        self.seconds = time.perf_counter() - started
        assert self.lossless is not None
        rank_zero_info(
            f"Reconstructed in {self.seconds:.2f} s: {dense:,} to {count_params(pl_module):,} parameters; "
            f"{'lossless' if self.lossless.passed else 'NOT lossless'}, relative error "
            f"{self.lossless.max_rel_error:.1e} against the masked model in {self.lossless.dtype}"
        )
