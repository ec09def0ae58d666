"""When to mask: as soon as there are scores, at once or in rounds."""

from __future__ import annotations

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info

from lightning_prune.callbacks.common import check_trainer, example_inputs, predecessor
from lightning_prune.callbacks.scoring import ScoringCallback
from lightning_prune.errors import CallbackError
from lightning_prune.graph import ChannelGraph
from lightning_prune.masking import MaskHandle, mask_
from lightning_prune.plan import Coupling, Plan, check_coupling
from lightning_prune.schedule import Rounds, keep_removed
from lightning_prune.selection import GlobalRatio, Selection


class MaskingCallback(Callback):
    """Turns the scores of a `ScoringCallback` into a plan and holds the channels it removes at zero.

    Args:
        selection: which channels go; default ``GlobalRatio(0.5)``.
        coupling: ``joint``, ``union`` or ``intersection``, see `Selection.select`.
        batch_norm: mask batch norms with their filters; False is lossy.
        rounds: remove some channels, fine-tune, score again; None: all at once.

    Attributes:
        plan: once masked, all rounds so far.
        round: how many rounds are done.
        handle: the masks in force; `MaskHandle.zeros` says what is held at zero.

    Raises:
        CallbackError: no ScoringCallback before it, or too few epochs for the rounds.
        PlanError: nothing to prune; no weight has been touched then.
    """

    def __init__(
        self,
        selection: Selection | None = None,
        *,
        coupling: Coupling = "joint",
        batch_norm: bool = True,
        rounds: Rounds | None = None,
    ) -> None:
        check_coupling(coupling)
        self.selection = selection if selection is not None else GlobalRatio(0.5)
        self.coupling = coupling
        self.batch_norm = batch_norm
        self.rounds = rounds
        self.round = 0
        self.plan: Plan | None = None
        self._steps: list[Selection] = []
        self._epochs_since = 0
        self.handle: MaskHandle | None = None

    @property
    def done(self) -> bool:
        """Whether everything that is to be removed is masked."""
        return self.plan is not None and self.round == len(self._steps)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            check_trainer(trainer, self)
            predecessor(trainer, self, ScoringCallback)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mask_when_ready(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epochs_since += 1
        if self.rounds is not None and self.plan is not None and not self.done:
            if self._epochs_since < self.rounds.epochs:
                return
            predecessor(trainer, self, ScoringCallback).rescore(trainer, pl_module)
        self._mask_when_ready(trainer, pl_module)

    def _mask_when_ready(self, trainer: Trainer, pl_module: LightningModule) -> None:
        scoring = predecessor(trainer, self, ScoringCallback)
        if self.done or scoring.graph is None or scoring.scores is None:
            return
        if not self._steps:
            self._steps = self._plan_rounds(trainer, scoring.graph)
        scores = scoring.scores if self.plan is None else keep_removed(scoring.scores, self.plan)
        selection = self._steps[self.round]
        inputs = example_inputs(pl_module, scoring.example_inputs) if selection.needs_model else None
        plan = selection.select(
            scoring.graph,
            scores,
            coupling=self.coupling,
            batch_norm=self.batch_norm,
            model=pl_module,
            example_inputs=inputs,
        )
        if self.handle is not None:
            self.handle.remove()
        self.handle = mask_(pl_module, scoring.graph, plan, optimizers=trainer.optimizers)
        self.plan = plan
        self.round += 1
        self._epochs_since = 0
        total = sum(group.size * len(group.layers) for group in plan.groups.values())
        gone = total - sum(len(kept) for group in plan.groups.values() for kept in group.layers.values())
        number = f" (round {self.round} of {len(self._steps)})" if self.rounds is not None else ""
        rank_zero_info(f"Masked {gone:,} of {total:,} channels of all prunable layers{number}")

    def _plan_rounds(self, trainer: Trainer, graph: ChannelGraph) -> list[Selection]:
        if self.rounds is None:
            return [self.selection]
        steps = self.rounds.selections(self.selection, graph)
        needed = trainer.current_epoch + (len(steps) - 1) * self.rounds.epochs + 1
        if trainer.max_epochs is not None and 0 <= trainer.max_epochs < needed:
            raise CallbackError(
                f"{len(steps)} rounds of {self.rounds.channels} channels with {self.rounds.epochs} epochs between them "
                f"need max_epochs of at least {needed}, got {trainer.max_epochs}; remove more channels per round, or "
                "train longer"
            )
        return steps
