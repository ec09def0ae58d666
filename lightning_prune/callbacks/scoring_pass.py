"""A pass over the training data outside the training loop, which then goes on as if there had been none."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from functools import partial
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.trainer.states import RunningStage
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from lightning_prune.callbacks.first_batches import given_loaders, read_once, transferred, untouched_loaders
from lightning_prune.callbacks.module import uncompiled
from lightning_prune.callbacks.processes import failing_together, sum_over_processes_
from lightning_prune.callbacks.user_steps import Surroundings, loss_in, run_step
from lightning_prune.callbacks.without_side_effects import Loaders, attached
from lightning_prune.criteria import Criterion, Scorer, Scores
from lightning_prune.errors import CallbackError, ScoreError
from lightning_prune.model_state.preservation import copy_sharing_tensors, own_tensors_

Amount = int | float | None


def checked_amount(name: str, amount: Amount) -> Amount:
    """A number of batches, a share of them, or None for all; configurations may turn 32 into 32.0."""
    if isinstance(amount, float) and amount > 1 and amount.is_integer():
        return int(amount)
    count = isinstance(amount, int) and not isinstance(amount, bool) and amount >= 1
    share = isinstance(amount, float) and 0 < amount < 1
    if amount is not None and not count and not share:
        raise CallbackError(
            f"{name} must be at least 1 (batches), a share in (0, 1), or None for all batches, got {amount!r}"
        )
    return amount


def check_scorable(criterion: Criterion, trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse a module whose training_step cannot show a criterion what it needs, and processes that cannot share it."""
    name = type(pl_module).__name__
    step = type(pl_module).training_step.__qualname__  # by name: there are two namespaces of Lightning
    if criterion.needs_backward and step == "LightningModule.training_step":
        raise ScoreError(
            f"{criterion!r} needs gradients, but {name} has no training_step that returns a loss; define one, or "
            "use a criterion that looks at weights only, such as L1"
        )
    if criterion.needs_fitting and trainer.world_size > 1:
        raise CallbackError(
            f"{criterion!r} fits auxiliary heads to the data of one process; use heads=0, another criterion, "
            "or scores=... of a run with devices=1"
        )
    if criterion.needs_fitting and not pl_module.automatic_optimization:
        raise CallbackError(
            f"{criterion!r} fits auxiliary heads along with the loss of training_step, which {name} differentiates "
            "itself (manual optimization); use heads=0, or another criterion"
        )


def summed_up(
    trainer: Trainer,
    pl_module: LightningModule,
    scorer_of: Callable[[nn.Module], Scorer],
    amount: Amount = None,
    passes: int = 1,
) -> Scores:
    """Score on frozen weights, now, over all processes; random state and everything else of the run stay as they are.

    The steps find what hooks before them set: those that are still to come run first, those of a batch around it.

    Args:
        trainer: whose training data are seen.
        pl_module: of the model as it is.
        scorer_of: makes the scorer of a copy of the module; if it keeps the modes, the step takes the branches of
            training while batch norms and dropouts are in eval mode.
        amount: of batches, per process.
        passes: over them.
    """
    with uncompiled(pl_module):
        with failing_together():
            copied = copy_sharing_tensors(pl_module)  # what the steps note (metrics, counters) is noted on the copy
            scorer = scorer_of(copied)
            if scorer.bn_mode == "keep":
                _freeze_statistics(copied)
        if scorer.criterion.needs_forward and scorer.graph.prunable_groups:  # a later step may leave none
            title = f"Scoring ({type(scorer.criterion).__name__})"
            with attached(copied, trainer, RunningStage.TRAINING), scorer:
                _set_up_data(trainer)
                with failing_together():
                    own_tensors_(copied, pl_module)  # and what they write (averages, clipped weights), written to it
                    around = Surroundings(trainer, pl_module, copied)
                    with Loaders(trainer).shown(RunningStage.TRAINING):
                        around.begin()
                        if scorer.bn_mode == "keep":  # a hook may have called train()
                            _freeze_statistics(copied)
                        for see in _sights(scorer, copied):
                            with closing(training_batches(trainer, copied, amount, passes, title)) as batches:
                                see_batches(see, partial(run_step, trainer, copied), around, copied, batches)
    return scores_of_all(scorer)


def _sights(scorer: Scorer, module: LightningModule) -> tuple[Callable[[Callable[[], Any]], None], ...]:
    """What sees the step of every batch, one after the other."""
    return scorer.passes if module.automatic_optimization else (partial(scorer.update, differentiates=True),)


def _freeze_statistics(module: nn.Module) -> None:
    """Modules without parts, and torch's own, in eval mode; others keep theirs: theirs are the branches of training.

    Detectors return losses in train mode and boxes in eval mode, some classifiers one head more.
    """
    for part in module.modules():
        if next(part.children(), None) is None or type(part).__module__.startswith("torch.nn."):
            part.training = False


def scores_of_all(scorer: Scorer) -> Scores:
    """What the sums of all processes come to."""
    sum_over_processes_(scorer.state)
    with failing_together():
        return scorer.compute()


def _set_up_data(trainer: Trainer) -> None:
    """At once, since the processes wait for one another; the batches need no messages."""
    with untouched_loaders(given_loaders(trainer)):  # Lightning starts each of them once
        trainer.fit_loop.setup_data()


def training_batches(
    trainer: Trainer, module: LightningModule, amount: Amount, passes: int, title: str
) -> Generator[tuple[int, Any]]:
    """Batches of the training data as this copy of the module gets them, with a progress bar."""
    combined: Any = trainer.fit_loop._combined_loader
    if combined is None:
        raise CallbackError("there is no training data to score on; pass train_dataloaders or a datamodule to fit")
    limit = number_of_batches(amount, trainer.fit_loop.max_batches)
    if (
        amount is None
        and trainer.limit_train_batches == 1.0
        and any(read_once(loader) for loader in combined.flattened)
    ):
        raise CallbackError(
            "these training data can be read only once (iter() gives the same iterator again): scoring on all of them "
            "would leave nothing to train on. Pass score_batches=..., or data that start anew with every iter()"
        )
    total = None if math.isinf(limit) else int(limit)

    def one_pass() -> Generator[tuple[int, Any]]:
        fresh = type(combined)(combined.iterables, combined._mode)  # the loop iterates over the other one
        yield from ((index, batch) for batch, index, _ in itertools.islice(iter(fresh), total))

    batches = itertools.chain.from_iterable(one_pass() for _ in range(passes))
    shown = trainer.progress_bar_callback is not None and trainer.is_global_zero
    number = None if total is None else total * passes

    def shown_batches() -> Generator[tuple[int, Any]]:
        with untouched_loaders(combined.flattened):
            console = Console()
            for index, batch in track(batches, title, number, console=console, transient=True, disable=not shown):
                yield index, transferred(trainer, module, batch)

    return shown_batches()


def number_of_batches(amount: Amount, most: float) -> float:
    """How many of ``most`` batches are scored on."""
    if isinstance(amount, float):
        if math.isinf(most):
            raise CallbackError(f"score_batches={amount} is a share, and these training data have no length")
        amount = max(1, round(amount * most))
    return min(most, amount or math.inf)


class SkippedBatchError(Exception):
    """A training_step returned None: the user skips this batch."""


def see_batches(
    see: Callable[[Callable[[], Any]], None],
    step: Callable[[Any, int], Any],
    around: Surroundings,
    pl_module: LightningModule,
    batches: Iterable[tuple[int, Any]],
) -> None:
    """Show every batch that the training_step does not skip, up to one at which a hook skips the rest of the epoch.

    Raises:
        ScoreError: all of them are skipped.
    """
    shown = skipped = 0
    ended = False
    output: Any = None

    def taken(batch: Any, batch_idx: int) -> Any:
        nonlocal output
        output = step(batch, batch_idx)
        return loss_of(output, pl_module) if pl_module.automatic_optimization else output

    for batch_idx, batch in batches:
        if ended := not around.begin_batch(batch, batch_idx):
            break
        output = None
        try:
            see(partial(taken, batch, batch_idx))
            shown += 1
        except SkippedBatchError:
            skipped += 1
        around.end_batch(output, batch, batch_idx)
    if shown or pl_module.trainer.world_size > 1:  # else another process may have seen some
        return
    name = type(pl_module).__name__
    if ended and not skipped:
        raise ScoreError(
            f"{name}.on_train_batch_start returned -1 for the first batch, which skips the whole epoch: there is "
            "nothing to score on. Score in a later epoch (start=...), or use a criterion that looks at weights only, "
            "such as L1"
        )
    if skipped:
        raise ScoreError(
            f"{name}.training_step returned NoneType, not a loss, for all {skipped} batches: it skips them all, or "
            "lacks a return; there is nothing to score on"
        )


def loss_of(output: Any, pl_module: LightningModule) -> Tensor:
    """What a training_step returned, as a loss; `SkippedBatchError` where it returned none."""
    if output is None:
        raise SkippedBatchError
    loss = loss_in(output)
    if not isinstance(loss, Tensor):
        raise ScoreError(
            f"{type(pl_module).__name__}.training_step returned {type(output).__name__}, not a loss; gradients are "
            "scored on the loss it returns (a tensor, or a dict with the key 'loss')"
        )
    return loss
