"""When to score: on a pass of its own, or while epochs train."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_prune.callbacks.module import in_precision, same_module, uncompiled
from lightning_prune.callbacks.processes import (
    check_same_number_of_batches,
    check_start,
    check_strategy,
    failing_together,
    forget_start,
    lost_process,
    sum_over_processes_,
)
from lightning_prune.callbacks.run import RUNS, PruningRun, batches_done, resumes
from lightning_prune.callbacks.scoring_pass import (
    Amount,
    check_scorable,
    checked_amount,
    number_of_batches,
    scores_of_all,
    summed_up,
)
from lightning_prune.criteria import Criterion, Scorer, Scores, criterion_from
from lightning_prune.errors import CallbackError
from lightning_prune.graph import ChannelGraph
from lightning_prune.graph.describe import nothing_to_prune
from lightning_prune.session import PruningSession

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
        bn_mode: of batch norms and dropouts while scoring on frozen weights: ``eval`` (frozen statistics) or ``train``;
            the rest of the module takes the branches of training.
        start: the epoch at whose start scoring begins (0: before training, others: after that many epochs of
            warm-up), or ``end``: when training is over.
        scores: of an earlier pass over this model (or the file that `Scores.save` wrote), instead of a first pass.
        example_inputs: what to trace with and compare on; None: the module's ``example_input_array``, or what its
            ``training_step`` gives to ``self(...)`` of the first batch, two samples of it.
        statistics: prune channels under layer norms and the like too, with loss, see `lightning_prune.trace`.
        baseline: state dict of the dense model, for criteria with ``reference="baseline"``; None: the module's
            weights when scoring starts.
        also: what the model will run besides its forward and its own steps, which are traced on a first batch anyway:
            inputs that take other branches, callables that are given a copy of the module; see
            `lightning_prune.trace`.

    Raises:
        CallbackError: in a Trainer where scoring cannot work, or without example inputs.
        ScoreError: no training_step loss, or scores that are not finite; no weight has been touched then.

    Example:
        >>> ScoringCallback("l1", start=2).criterion
        L1(normalize='mean', combine='mean')
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
        also: Sequence[Any] = (),
    ) -> None:
        if not isinstance(score_epochs, int) or isinstance(score_epochs, bool) or score_epochs < 1:
            raise CallbackError(f"score_epochs must be an integer, at least 1, got {score_epochs!r}")
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
        self.also = also
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
        self.run: PruningRun | None = None
        self._fits = True
        self._scorer: Scorer | None = None
        self._since = 0
        self._sums: dict[str, Tensor] | None = None
        self._noted: dict[str, Any] | None = None  # of a masked model that was evaluated: to go on from if it is fitted

    @property
    def graph(self) -> ChannelGraph | None:
        """Channel graph of the model as it is now."""
        return None if self.run is None else self.run.session.graph

    @property
    def dense_graph(self) -> ChannelGraph | None:
        """Channel graph of the dense model."""
        return None if self.run is None else self.run.session.dense_graph

    @property
    def scores(self) -> Scores | None:
        """The newest scores, in the channels of the model as it was then."""
        return None if self.run is None else self.run.session.scores

    @property
    def history(self) -> list[tuple[int, Scores]]:
        """All scores so far with the epoch they were computed in."""
        return [] if self.run is None else list(zip(self.run.scored_in, self.run.session.history, strict=True))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.run is None:
            session = PruningSession(
                pl_module,
                lambda: self._run.example_inputs(pl_module, self.example_inputs),
                criterion=self.criterion,
                statistics=self.statistics,
                also=lambda: [*self.also, *self._run.steps(pl_module)],
            )
            self.run = PruningRun(session)
        self.run.open(trainer, self)
        self._fits = stage == "fit"
        if self._fits:
            same_module(self, self.run.session.model, pl_module)
            check_strategy(trainer, type(self).__name__)
            check_scorable(self.criterion, trainer, pl_module)
            check_start(trainer)
            if batches_done(trainer) == 0:  # what a fit that failed has left
                self._scorer = self._sums = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        RUNS.pop(trainer, None)
        forget_start(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._noted is not None:
            self.load_state_dict(self._noted)
        if self._sums is not None:  # resumed in the middle of scoring
            self._begin(trainer, pl_module)
        elif self._awaited and self.start == 0 and not resumes(trainer):  # else once optimizers are restored
            loaders = trainer.fit_loop._combined_loader  # where configure_optimizers has asked how long training is
            self._begin(trainer, pl_module)
            trainer.fit_loop._combined_loader = loaders  # else training sets up its own, as if nothing had been scored

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_same_number_of_batches(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish_when_seen(trainer)
        if self._awaited and self.start != "end" and trainer.current_epoch >= self.start:
            self._begin(trainer, pl_module)
        self._score_again_when_due(trainer, pl_module, 0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._score_again_when_due(trainer, pl_module, batch_idx)
        if self._scorer is not None and batch_idx < self._limit(trainer):
            self._scorer.begin_batch()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._scorer is not None:
            # training_step skipped the batch; by hand it may train another network on this one
            self._scorer.end_batch(discard=outputs is None, required=pl_module.automatic_optimization)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish_when_seen(trainer)
        if self._awaited and self.start == "end":
            self._begin(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run.at_last(trainer, pl_module, self.on_train_end)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")  # Lightning calls none then
        if self._scorer is not None:
            self._scorer.end_batch(discard=True)
        if said := lost_process(exception):
            exception.args = (said,)

    def state_dict(self) -> dict[str, Any]:
        """The run's session, and the sums of a pass under way: tensors and plain data."""
        if self.run is None:
            return {}
        return {
            "session": self.run.session.state_dict(),
            "scored_in": self.run.scored_in,
            "step": [self.run.epoch, self.run.batch],
            "since": self._since,
            "sums": None if self._scorer is None else self._sums_of_all(self._scorer),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there when fitting starts."""
        run = self._run
        if self._fits:
            in_precision(run.session.model)
        with uncompiled(run.session.model):
            run.session.load_state_dict(state_dict["session"], evaluated=not self._fits)
        self._noted = None if self._fits or run.session.built is not None else state_dict
        run.scored_in = list(state_dict["scored_in"])
        run.epoch, run.batch = state_dict["step"]
        self._since, self._sums = state_dict["since"], state_dict["sums"]

    @property
    def _run(self) -> PruningRun:
        assert self.run is not None, "setup comes first"
        return self.run

    @property
    def _awaited(self) -> bool:
        """Whether the first scores are still to come, and no pass is under way."""
        return self.scores is None and self._scorer is None

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first scores: given, from a pass of their own, or from the epochs that start now."""
        session = self._run.session
        with failing_together(), uncompiled(pl_module):
            graph = session.graph
            if not graph.prunable_groups:
                reasons = nothing_to_prune(graph.groups, graph.notes)
                raise CallbackError(f"nothing to prune in {type(pl_module).__name__}: {reasons}")
            if self.given is not None:
                self._keep(trainer, self.given if isinstance(self.given, Scores) else Scores.load(self.given, graph))
                return
        if self.criterion.needs_reference and session.baseline is None:
            session.baseline = self.baseline or {
                name: tensor.detach().clone() for name, tensor in pl_module.state_dict().items()
            }
        if not (self.update_weights and self.criterion.needs_forward):
            self._score(trainer, pl_module)
            return
        self._scorer = session.scorer("keep")
        if self._sums is None:
            self._since = trainer.current_epoch
        else:
            for name, total in self._sums.items() if trainer.is_global_zero else ():  # they are those of all processes
                self._scorer.state[name].copy_(total)
            self._sums = None

    def _score(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """On frozen weights, now; random state and everything else of the run stay as they are."""
        scorer_of = partial(self._run.session.scorer, "keep" if self.bn_mode == "eval" else self.bn_mode)
        self._keep(trainer, summed_up(trainer, pl_module, scorer_of, self.score_batches, self.score_epochs))

    def _score_again_when_due(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        if self._run.due(trainer, batch_idx):
            self._score(trainer, pl_module)

    def _finish_when_seen(self, trainer: Trainer) -> None:
        if self._scorer is not None and trainer.current_epoch - self._since >= self.score_epochs:
            scorer, self._scorer = self._scorer, None
            self._keep(trainer, scores_of_all(scorer))

    @staticmethod
    def _sums_of_all(scorer: Scorer) -> dict[str, Tensor]:
        sums = {name: total.clone() for name, total in scorer.state.items()}
        sum_over_processes_(sums)
        return sums

    def _keep(self, trainer: Trainer, scores: Scores) -> None:
        self._run.session.scores = scores
        self._run.scored_in.append(trainer.current_epoch)

    def _limit(self, trainer: Trainer) -> float:
        return number_of_batches(self.score_batches, trainer.num_training_batches)
