"""When to mask: as soon as there are scores."""

from __future__ import annotations

from pytorch_lightning import Callback, LightningModule, Trainer

from lightning_prune.callbacks.common import check_trainer, predecessor
from lightning_prune.callbacks.scoring import ScoringCallback
from lightning_prune.masking import MaskHandle, mask_
from lightning_prune.plan import Coupling, Plan, check_coupling
from lightning_prune.selection import GlobalRatio, Selection


class MaskingCallback(Callback):
    """Turns the scores of a `ScoringCallback` into a plan and holds the channels it removes at zero.

    Args:
        selection: which channels go; default ``GlobalRatio(0.5)``.
        coupling: ``joint``, ``union`` or ``intersection``, see `Selection.select`.
        batch_norm: mask batch norms with their filters; False is lossy.

    Attributes:
        plan: once masked.
        handle: the masks in force; `MaskHandle.zeros` says what is held at zero.

    Raises:
        CallbackError: no ScoringCallback before it.
        PlanError: nothing to prune; no weight has been touched then.
    """

    def __init__(
        self, selection: Selection | None = None, *, coupling: Coupling = "joint", batch_norm: bool = True
    ) -> None:
        check_coupling(coupling)
        self.selection = selection if selection is not None else GlobalRatio(0.5)
        self.coupling = coupling
        self.batch_norm = batch_norm
        self.plan: Plan | None = None
        self.handle: MaskHandle | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            check_trainer(trainer, self)
            predecessor(trainer, self, ScoringCallback)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mask_when_ready(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mask_when_ready(trainer, pl_module)

    def _mask_when_ready(self, trainer: Trainer, pl_module: LightningModule) -> None:
        scoring = predecessor(trainer, self, ScoringCallback)
        if self.plan is not None or scoring.graph is None or scoring.scores is None:
            return
        plan = self.selection.select(scoring.graph, scoring.scores, coupling=self.coupling, batch_norm=self.batch_norm)
        self.handle = mask_(pl_module, scoring.graph, plan, optimizers=trainer.optimizers)
        self.plan = plan
