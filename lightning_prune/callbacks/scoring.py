"""When to score: before training on a pass of its own, or while the first epochs train."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.model_helpers import is_overridden
from rich.console import Console
from rich.progress import track
from torch import Tensor

from lightning_prune.callbacks.common import check_not_resumed, check_trainer, example_inputs
from lightning_prune.criteria import Criterion, criterion_from
from lightning_prune.errors import CallbackError, ScoreError
from lightning_prune.graph import ChannelGraph, trace
from lightning_prune.scoring import Scorer, Scores


class ScoringCallback(Callback):
    """Scores every channel by hooks on the forward activations and backward gradients of the user's training_step.

    Args:
        criterion: an instance, or a name such as "jre".
        score_batches: batches of the training data to score on; None: all of them.
        score_epochs: passes over them.
        update_weights: score while training (the first ``score_epochs`` epochs) instead of on frozen weights.
        bn_mode: ``eval`` (frozen statistics) or ``train`` while scoring on frozen weights.
        example_inputs: what to trace with; None: the module's ``example_input_array``.
        statistics: prune channels under layer norms and the like too, with loss, see `lightning_prune.trace`.
        baseline: state dict of the dense model, for criteria with ``reference="baseline"``; None: the module's
            weights when fitting starts.

    Attributes:
        graph: channel graph of the dense model, once fitting has started.
        scores: the scores, once computed.
        ready: whether they are.

    Raises:
        CallbackError: in a Trainer where scoring cannot work, or without example inputs.
        ScoreError: no training_step loss, or scores that are not finite; no weight has been touched then.
    """

    def __init__(
        self,
        criterion: Criterion | str = "jre",
        *,
        score_batches: int | None = None,
        score_epochs: int = 1,
        update_weights: bool = False,
        bn_mode: Literal["eval", "train"] = "eval",
        example_inputs: Any = None,
        statistics: bool = False,
        baseline: dict[str, Tensor] | None = None,
    ) -> None:
        if score_epochs < 1 or (score_batches is not None and score_batches < 1):
            raise CallbackError("score_epochs and score_batches must be at least 1")
        self.criterion = criterion_from(criterion)
        self.score_batches = score_batches
        self.score_epochs = score_epochs
        self.update_weights = update_weights
        self.bn_mode = bn_mode
        self.example_inputs = example_inputs
        self.statistics = statistics
        self.baseline = baseline
        if update_weights and self.criterion.needs_reference:
            raise CallbackError(
                "reference='baseline' runs the dense model beside the current one and cannot score while training; use "
                "update_weights=False"
            )
        if update_weights and self.criterion.needs_heads:
            raise CallbackError(
                f"{self.criterion!r} fits auxiliary heads in a pass of its own and cannot score while training; use "
                "update_weights=False"
            )
        self.graph: ChannelGraph | None = None
        self.scores: Scores | None = None
        self._scorer: Scorer | None = None

    @property
    def ready(self) -> bool:
        """Whether there are scores."""
        return self.scores is not None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        check_trainer(trainer, self)
        if self.criterion.needs_backward and not is_overridden("training_step", pl_module):
            raise ScoreError(
                f"{self.criterion!r} needs gradients, but {type(pl_module).__name__} has no training_step that returns "
                "a loss; define one, or use a criterion that looks at weights only, such as L1"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.ready:
            return
        check_not_resumed(trainer, self)
        self.graph = trace(pl_module, example_inputs(pl_module, self.example_inputs), statistics=self.statistics)
        if not self.graph.prunable_groups:
            reasons = "; ".join(f"{group.name} {group.reason}" for group in self.graph.groups) or "no layer was found"
            raise CallbackError(f"nothing to prune in {type(pl_module).__name__}: {reasons}")
        if self.criterion.needs_reference and self.baseline is None:
            self.baseline = {name: tensor.detach().clone() for name, tensor in pl_module.state_dict().items()}
        if self.update_weights and self.criterion.needs_forward:
            self._scorer = self._new_scorer(pl_module, "keep")
        else:
            self.rescore(trainer, pl_module)
            trainer.fit_loop._combined_loader = None  # training sets up its own, as if nothing had been scored

    def rescore(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score again on frozen weights, now; random state and everything else of the run stay as they are."""
        scorer = self._new_scorer(pl_module, self.bn_mode)
        if self.criterion.needs_forward:
            with _silent_log(pl_module), scorer, torch.enable_grad():
                for see in scorer.passes:
                    for batch_idx, batch in self._batches(trainer, pl_module):
                        with trainer.precision_plugin.train_step_context():
                            see(lambda: _loss_of(pl_module.training_step(batch, batch_idx), pl_module))  # noqa: B023
        self.scores = scorer.compute()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._scorer is not None and (self.score_batches is None or batch_idx < self.score_batches):
            self._scorer.begin_batch()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._scorer is not None:
            self._scorer.end_batch(discard=outputs is None)  # training_step skipped the batch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._scorer is not None and trainer.current_epoch + 1 >= self.score_epochs:
            self.scores = self._scorer.compute()
            self._scorer = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._scorer is not None:
            self._scorer.end_batch(discard=True)
            self._scorer = None

    def _new_scorer(self, pl_module: LightningModule, bn_mode: Literal["eval", "train", "keep"]) -> Scorer:
        assert self.graph is not None
        baseline = self.baseline if self.criterion.needs_reference else None
        return Scorer(pl_module, self.graph, self.criterion, baseline=baseline, bn_mode=bn_mode)

    def _batches(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[tuple[int, Any]]:
        trainer.fit_loop.setup_data()
        loader = trainer.train_dataloader
        if loader is None:
            raise CallbackError("there is no training data to score on; pass train_dataloaders or a datamodule to fit")
        limit = min(trainer.fit_loop.max_batches, self.score_batches or math.inf)
        total = None if math.isinf(limit) else int(limit) * self.score_epochs
        passes = (
            itertools.islice(enumerate(loader), None if total is None else int(limit)) for _ in range(self.score_epochs)
        )
        batches = itertools.chain.from_iterable(passes)
        shown = trainer.progress_bar_callback is not None
        for batch_idx, batch in track(
            batches,
            f"Scoring ({type(self.criterion).__name__})",
            total,
            console=Console(),
            transient=True,
            disable=not shown,
        ):
            yield batch_idx, pl_module._apply_batch_transfer_handler(batch)


def _loss_of(output: Any, pl_module: LightningModule) -> Tensor:
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, Tensor):
        raise ScoreError(
            f"{type(pl_module).__name__}.training_step returned {type(output).__name__}, not a loss; gradients are "
            "scored on the loss it returns (a tensor, or a dict with the key 'loss')"
        )
    return loss


@contextmanager
def _silent_log(pl_module: LightningModule) -> Iterator[None]:
    """training_step may log; outside the training loop that has nowhere to go."""

    def nowhere(*_: Any, **__: Any) -> None: ...

    pl_module.log = pl_module.log_dict = nowhere  # type: ignore[method-assign]
    try:
        yield
    finally:
        del pl_module.log, pl_module.log_dict
