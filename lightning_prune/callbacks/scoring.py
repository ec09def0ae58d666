"""When to score: on a pass of its own, or while epochs train."""

from __future__ import annotations

import os
from typing import Any, Literal

from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_prune.callbacks.common import check_trainer, example_inputs, same_module, uncompiled
from lightning_prune.callbacks.processes import sum_over_processes_
from lightning_prune.callbacks.scoring_pass import (
    Amount,
    checked_amount,
    loss_of,
    training_batches,
    training_step_alone,
)
from lightning_prune.criteria import Criterion, criterion_from
from lightning_prune.criteria.scoring import Scorer, Scores
from lightning_prune.errors import CallbackError, ScoreError
from lightning_prune.graph import ChannelGraph, trace

Start = int | Literal["end"]


class ScoringCallback(Callback):
    """Scores every channel by hooks on the forward activations and backward gradients of the user's training_step.

    With several processes each scores its own share of the data, and the sums are added up.

    Args:
        criterion: an instance, or a name such as "jre".
        score_batches: batches of the training data to score on, per process: a number, a share of them in (0, 1), or
            None: all.
        score_epochs: passes over them.
        update_weights: score while training (for ``score_epochs`` epochs) instead of on frozen weights.
        bn_mode: ``eval`` (frozen statistics) or ``train`` while scoring on frozen weights.
        start: the epoch at whose start scoring begins (0: before training, others: after that many epochs of
            warm-up), or ``end``: when training is over.
        scores: of an earlier pass over this model (or the file that `Scores.save` wrote), instead of a first pass.
        example_inputs: what to trace with; None: the module's ``example_input_array``.
        statistics: prune channels under layer norms and the like too, with loss, see `lightning_prune.trace`.
        baseline: state dict of the dense model, for criteria with ``reference="baseline"``; None: the module's
            weights when scoring starts.

    Attributes:
        graph: channel graph of the model as it is now, once scoring has started.
        dense_graph: that of the dense model.
        scores: the newest scores, in the channels of ``graph``, once computed.
        history: all scores so far with the epoch they were computed in.

    Raises:
        CallbackError: in a Trainer where scoring cannot work, or without example inputs.
        ScoreError: no training_step loss, or scores that are not finite; no weight has been touched then.
    """

    def __init__(
        self,
        criterion: Criterion | str = "jre",
        *,
        score_batches: Amount = None,
        score_epochs: int = 1,
        update_weights: bool = False,
        bn_mode: Literal["eval", "train"] = "eval",
        start: Start = 0,
        scores: Scores | str | os.PathLike[str] | None = None,
        example_inputs: Any = None,
        statistics: bool = False,
        baseline: dict[str, Tensor] | None = None,
    ) -> None:
        if score_epochs < 1:
            raise CallbackError(f"score_epochs must be at least 1, got {score_epochs!r}")
        if start != "end" and (not isinstance(start, int) or isinstance(start, bool) or start < 0):
            raise CallbackError(f"start must be an epoch (0, 1, ...) or 'end', got {start!r}")
        self.criterion = criterion_from(criterion)
        self.score_batches = checked_amount("score_batches", score_batches)
        self.score_epochs = score_epochs
        self.update_weights = update_weights
        self.bn_mode = bn_mode
        self.start = start
        self.given = scores
        self.example_inputs = example_inputs
        self.statistics = statistics
        self.baseline = baseline
        if update_weights and self.criterion.needs_reference:
            raise CallbackError(
                "reference='baseline' runs the dense model beside the current one and cannot score while training; use "
                "update_weights=False"
            )
        if update_weights and start == "end":
            raise CallbackError("start='end' leaves no epoch to score in; use update_weights=False")
        if update_weights and self.criterion.needs_fitting:
            raise CallbackError(
                f"{self.criterion!r} fits auxiliary heads in a pass of its own and cannot score while training; use "
                "update_weights=False"
            )
        self.graph: ChannelGraph | None = None
        self.dense_graph: ChannelGraph | None = None
        self.scores: Scores | None = None
        self.history: list[tuple[int, Scores]] = []
        self._scorer: Scorer | None = None
        self._since = 0
        self._sums: dict[str, Tensor] | None = None
        self._module: LightningModule | None = None

    @property
    def ready(self) -> bool:
        """Whether there are scores."""
        return self.scores is not None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        check_trainer(trainer, self)
        self._module = same_module(self, self._module, pl_module)
        if (
            self.criterion.needs_backward
            and type(pl_module).training_step.__qualname__ == "LightningModule.training_step"
        ):
            raise ScoreError(
                f"{self.criterion!r} needs gradients, but {type(pl_module).__name__} has no training_step that returns "
                "a loss; define one, or use a criterion that looks at weights only, such as L1"
            )

        if self.criterion.needs_fitting and trainer.world_size > 1:
            raise CallbackError(
                f"{self.criterion!r} fits auxiliary heads to the data of one process; use heads=0, another criterion, "
                "or scores=... of a run with devices=1"
            )
        if self.criterion.needs_forward and not pl_module.automatic_optimization and not self.update_weights:
            raise CallbackError(
                f"{type(pl_module).__name__} uses manual optimization: its training_step steps the optimizers itself, "
                "so a scoring pass would train it. Use update_weights=True (score while training) or a criterion that "
                "looks at weights only, such as L1"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._sums is not None:  # resumed in the middle of scoring
            self._begin(trainer, pl_module)
        elif not self.ready and self.start == 0 and trainer.ckpt_path is None:  # else once optimizers are restored
            self._begin(trainer, pl_module)
            trainer.fit_loop._combined_loader = None  # training sets up its own, as if nothing had been scored

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish_when_seen(trainer)
        if not self.ready and self._scorer is None and self.start != "end" and trainer.current_epoch >= self.start:
            self._begin(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._scorer is not None and batch_idx < self._limit(trainer):
            self._scorer.begin_batch()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._scorer is not None:
            self._scorer.end_batch(discard=outputs is None)  # training_step skipped the batch

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish_when_seen(trainer)
        if not self.ready and self.start == "end":
            self._begin(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._scorer is not None:
            self._scorer.end_batch(discard=True)

    def state_dict(self) -> dict[str, Any]:
        """Scores, and the sums of a pass under way: tensors and plain data."""
        return {
            "history": [[epoch, scores.to_dict()] for epoch, scores in self.history],
            "since": self._since,
            "sums": None if self._scorer is None else dict(self._scorer.state),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there when fitting starts."""
        self.history = [(epoch, Scores.from_dict(scores)) for epoch, scores in state_dict["history"]]
        self.scores = self.history[-1][1] if self.history else None
        self._since, self._sums = state_dict["since"], state_dict["sums"]

    def retrace(self, pl_module: LightningModule) -> None:
        """Trace the model as it is now.

        Raises:
            CallbackError: nothing can be pruned.
        """
        inputs = example_inputs(pl_module, self.example_inputs)
        with uncompiled(pl_module):
            self.graph = trace(pl_module, inputs, statistics=self.statistics)
        if self.dense_graph is None:
            self.dense_graph = self.graph
        if not self.graph.prunable_groups:
            reasons = "; ".join(f"{group.name} {group.reason}" for group in self.graph.groups) or "no layer was found"
            raise CallbackError(f"nothing to prune in {type(pl_module).__name__}: {reasons}")

    def rescore(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score again on frozen weights, now; random state and everything else of the run stay as they are."""
        scorer = self._new_scorer(pl_module, self.bn_mode)
        if self.criterion.needs_forward:
            title = f"Scoring ({type(self.criterion).__name__})"
            with uncompiled(pl_module), training_step_alone(trainer, pl_module) as step, scorer:
                for see in scorer.passes:
                    for batch_idx, batch in training_batches(trainer, self.score_batches, self.score_epochs, title):
                        see(lambda: loss_of(step(batch, batch_idx), pl_module))  # noqa: B023
        self._keep(trainer, scorer)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.graph is None:
            self.retrace(pl_module)
        assert self.graph is not None
        if self.given is not None:
            self.scores = self.given if isinstance(self.given, Scores) else Scores.load(self.given, self.graph)
            self.scores.check(self.graph)
            self.history.append((trainer.current_epoch, self.scores))
            return
        if self.criterion.needs_reference and self.baseline is None:
            self.baseline = {name: tensor.detach().clone() for name, tensor in pl_module.state_dict().items()}
        if not (self.update_weights and self.criterion.needs_forward):
            self.rescore(trainer, pl_module)
            return
        self._scorer = self._new_scorer(pl_module, "keep")
        if self._sums is None:
            self._since = trainer.current_epoch
        else:
            for name, total in self._sums.items():
                self._scorer.state[name].copy_(total)
            self._sums = None

    def _finish_when_seen(self, trainer: Trainer) -> None:
        if self._scorer is not None and trainer.current_epoch - self._since >= self.score_epochs:
            scorer, self._scorer = self._scorer, None
            self._keep(trainer, scorer)

    def _keep(self, trainer: Trainer, scorer: Scorer) -> None:
        sum_over_processes_(scorer.state)
        self.scores = scorer.compute()
        self.history.append((trainer.current_epoch, self.scores))

    def _limit(self, trainer: Trainer) -> float:
        if self.score_batches is None or isinstance(self.score_batches, int):
            return self.score_batches or float("inf")
        return self.score_batches * trainer.num_training_batches

    def _new_scorer(self, pl_module: LightningModule, bn_mode: Literal["eval", "train", "keep"]) -> Scorer:
        assert self.graph is not None
        baseline = self.baseline if self.criterion.needs_reference else None
        return Scorer(pl_module, self.graph, self.criterion, baseline=baseline, bn_mode=bn_mode)
