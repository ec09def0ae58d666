"""Sparse learning on joint groups: channels shrink with all that goes with them, before they are pruned."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.callbacks.module import uncompiled
from lightning_prune.callbacks.processes import check_same_plan, check_strategy, of_the_first
from lightning_prune.callbacks.run import RUNS, PruningRun
from lightning_prune.callbacks.scoring import ScoringCallback
from lightning_prune.callbacks.scoring_pass import Amount, check_scorable, checked_amount, summed_up
from lightning_prune.criteria import (
    Criterion,
    GroupSparsity,
    Scorer,
    condemned_strengths,
    criterion_from,
    importance_strengths,
)
from lightning_prune.criteria.number_checks import check_integer, check_weight
from lightning_prune.errors import CallbackError
from lightning_prune.graph.describe import nothing_to_prune
from lightning_prune.selection import Selection
from lightning_prune.session import PruningSession


class GroupSparsityCallback(Callback):
    r"""Trains with a penalty on whole channels, so that little is lost when they are pruned.

    The penalty is that of `GroupSparsity`: the squared norm of all that goes with a channel, over all layers of its
    group, times ``strength`` and

    - with a ``selection``: 1 for the channels that it condemns and 0 for the others, growing from 0 over ``ramp``
      epochs, step by step (Wang et al., Growing Regularization, 2021). Give `PruneCallback` the same criterion and
      selection: the channels that have shrunk are those that go;
    - without: :math:`2^{\alpha (I_{max} - I_k) / (I_{max} - I_{min})}` for every channel (Fang et al., DepGraph, 2023).

    It acts from ``start`` until `PruneCallback` masks the first channels, or else as long as the fit lasts. Its
    gradient is added before every optimizer step (under gradient accumulation once per step, under mixed precision to
    the unscaled gradients), so before Lightning clips them; with several optimizers each step adds to the parameters
    that it updates. SGD with learning rate lr and momentum m then shrinks what nothing else holds by
    ``exp(-lr * strength * steps / (1 - m))``, over a ramp by its root: 10 in the exponent leaves nothing that counts.
    The loss that is logged does not hold the penalty.

    Logged after every epoch: ``group_sparsity``, the penalty, and with a selection ``condemned_norm``, the share of
    the condemned channels in the squared norm of all.

    Args:
        strength: weight of the penalty. DepGraph: 1e-4 to 5e-4, without a selection. Growing Regularization: up to 1,
            at a learning rate of 0.001 with momentum 0.9.
        selection: which channels are condemned; None: all shrink, each by its score.
        criterion: by which they are ranked; one that looks at data is shown training batches, on frozen weights.
        score_batches: how many, per process, see `ScoringCallback`.
        alpha: without a selection, by what power of two the worst channel of a group is penalised more than the best.
        start: the first epoch with a penalty.
        ramp: epochs over which it grows to its full strength; 0: at once; None: with a selection all until the
            model is pruned or training ends, else 0.
        renew: rank the channels again at the start of every epoch; False: they stay those of the first.
        example_inputs: what to trace with if nothing prunes in this fit; None: the module's ``example_input_array``.
        statistics: see `lightning_prune.trace`; if nothing prunes in this fit.
        also: likewise.

    Attributes:
        begun: whether any channel has been made to shrink, in this fit or in the one that it goes on with.

    Raises:
        ScoreError: a strength or alpha that is negative or not finite.
        CallbackError: a criterion that needs the dense model or fits something; nothing to prune; the model is
            pruned before it starts, or before the ramp ends.

    Example:
        >>> from lightning_prune import Budget, PruneCallback
        >>> half = Budget(flops=0.5)
        >>> sparse = GroupSparsityCallback(0.2, selection=half, criterion="l2")
        >>> callbacks = [sparse, PruneCallback("l2", selection=half, start=10)]
    """

    def __init__(
        self,
        strength: float,
        *,
        selection: Selection | None = None,
        criterion: Criterion | str = "l2",
        score_batches: Amount = None,
        alpha: float = 4.0,
        start: int = 0,
        ramp: int | None = None,
        renew: bool = True,
        example_inputs: Any = None,
        statistics: bool = False,
        also: Sequence[Any] = (),
    ) -> None:
        check_weight("strength", strength)
        check_weight("alpha", alpha)
        for name, epochs in (("start", start), ("ramp", 0 if ramp is None else ramp)):
            check_integer(name, epochs, "a number of epochs (0, 1, ...)", 0)
        if selection is not None and not isinstance(selection, Selection):
            raise CallbackError(f"selection must be a Selection such as GlobalRatio(0.5), got {selection!r}")
        self.strength = strength
        self.selection = selection
        self.criterion = criterion_from(criterion)
        self.score_batches = checked_amount("score_batches", score_batches)
        self.alpha = alpha
        self.start = start
        self.ramp = ramp
        self.renew = renew
        self.example_inputs = example_inputs
        self.statistics = statistics
        self.also = also
        if self.criterion.needs_fitting or self.criterion.needs_reference:
            raise CallbackError(
                f"{self.criterion!r} compares with the dense model or fits something to it, and channels are ranked "
                "here while training: use another criterion, such as TaylorFO or L2"
            )
        self.begun = False
        self._run: PruningRun | None = None
        self._ramp = 0
        self._strengths: dict[str, Tensor] = {}
        self._ranked_in: int | None = None
        self._penalty: GroupSparsity | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            check_strategy(trainer, type(self).__name__)
            check_scorable(self.criterion, trainer, pl_module)
            self._run, self._strengths, self._ranked_in, self._penalty = None, {}, None, None
            self.begun = False
            self._ramp = self._epochs_to_grow(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._run = RUNS.get(trainer) or self._own_run(pl_module)
        if self._session.plan is not None:
            return
        with uncompiled(pl_module):
            graph = self._session.graph  # now: later the loaders that it takes a first batch of are in use
        if not graph.prunable_groups:
            reasons = nothing_to_prune(graph.groups, graph.notes)
            raise CallbackError(f"nothing to prune in {type(pl_module).__name__}: {reasons}")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        known = self._ranked_in == trainer.current_epoch or (self._ranked_in is not None and not self.renew)
        if self._acts(trainer) and not known:
            self._strengths, self._ranked_in = self._rank(trainer, pl_module), trainer.current_epoch
            self._penalty = None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._acts(trainer):
            self.begun = True
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            self._current(pl_module).add_(self._factor(trainer), parameters)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._acts(trainer):
            value, graph = self._current(pl_module).value(), self._session.graph
            pl_module.log("group_sparsity", self._factor(trainer) * float(value), sync_dist=True)
            if self.selection is not None:
                ones = {group.name: torch.ones(group.size) for group in graph.prunable_groups}
                whole = GroupSparsity(pl_module, graph, ones).value()
                pl_module.log("condemned_norm", float(value / whole), sync_dist=True)

    def state_dict(self) -> dict[str, Any]:
        """How the channels were ranked last, and in which epoch: tensors and plain data."""
        return {"strengths": self._strengths, "ranked_in": self._ranked_in}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._strengths, self._ranked_in = state_dict["strengths"], state_dict["ranked_in"]
        self.begun = self._ranked_in is not None

    @property
    def _session(self) -> PruningSession:
        assert self._run is not None, "on_fit_start comes first"
        return self._run.session

    def _epochs_to_grow(self, trainer: Trainer) -> int:
        """Over how many the penalty grows, before the model is pruned or training ends."""
        parts = [getattr(other, "scoring", other) for other in trainer.callbacks]  # type: ignore[attr-defined]
        start: int | str = next((part.start for part in parts if isinstance(part, ScoringCallback)), "end")
        if isinstance(start, int) and start < self.start + max(1, self.ramp or 0):
            raise CallbackError(
                f"GroupSparsityCallback(start={self.start}, ramp={self.ramp}) has to be done when the model is pruned, "
                f"and that is at the start of epoch {start} here: give PruneCallback (or ScoringCallback) a later start"
            )
        if self.ramp is not None or self.selection is None:
            return self.ramp or 0
        end = start if isinstance(start, int) else trainer.max_epochs
        if end is None or end < 0:
            raise CallbackError("GroupSparsityCallback: no epoch is the last of this fit; pass ramp=..., in epochs")
        return max(0, end - self.start)

    def _own_run(self, pl_module: LightningModule) -> PruningRun:
        """What a callback that prunes would trace."""
        session = PruningSession(
            pl_module,
            lambda: run.example_inputs(pl_module, self.example_inputs),
            statistics=self.statistics,
            also=lambda: [*self.also, *run.steps(pl_module)],
        )
        run: PruningRun = PruningRun(session)
        return run

    def _acts(self, trainer: Trainer) -> bool:
        if self._session.plan is not None:
            self._penalty = None  # it takes memory
            return False
        return trainer.current_epoch >= self.start

    def _factor(self, trainer: Trainer) -> float:
        """The strength at the end of this batch."""
        if not self._ramp:
            return self.strength
        done = (trainer.fit_loop.batch_idx + 1) / trainer.num_training_batches  # 0 of a stream without end
        return self.strength * min(1.0, (trainer.current_epoch - self.start + done) / self._ramp)

    def _rank(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
        session, selection = self._session, self.selection

        def scorer_of(copied: nn.Module) -> Scorer:
            return Scorer(copied, session.graph, self.criterion, bn_mode="keep")

        scores = summed_up(trainer, pl_module, scorer_of, self.score_batches)
        if selection is None:
            return importance_strengths(scores, self.alpha)
        with uncompiled(pl_module):
            inputs = session.example_inputs if selection.needs_model else None
            select = partial(selection.select, session.graph, scores, model=pl_module, example_inputs=inputs)
            plan = of_the_first(select) if selection.measures_time else select()
        check_same_plan(plan)
        return condemned_strengths(plan)

    def _current(self, pl_module: LightningModule) -> GroupSparsity:
        """The penalty by the last ranking; built when it is needed, for a resumed run may lack an epoch's start."""
        if self._penalty is None:
            self._penalty = GroupSparsity(pl_module, self._session.graph, self._strengths)
        return self._penalty
