"""A pass over the training data outside the training loop, which then goes on as if there had been none."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from rich.console import Console
from rich.progress import track
from torch import Tensor

from lightning_prune.callbacks.first_batches import generators_kept, given_loaders, transferred
from lightning_prune.errors import CallbackError, ScoreError

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


def training_batches(
    trainer: Trainer, module: LightningModule, amount: Amount, passes: int, title: str
) -> Iterator[tuple[int, Any]]:
    """Batches of the training data as this copy of the module gets them, with a progress bar.

    The data are set up at once, for which the processes wait for one another; the batches need no messages.
    """
    with generators_kept(given_loaders(trainer)):  # Lightning starts each of them once
        trainer.fit_loop.setup_data()
    combined: Any = trainer.fit_loop._combined_loader
    if combined is None:
        raise CallbackError("there is no training data to score on; pass train_dataloaders or a datamodule to fit")
    most = trainer.fit_loop.max_batches
    if isinstance(amount, float):
        if math.isinf(most):
            raise CallbackError(f"score_batches={amount} is a share, and these training data have no length")
        amount = max(1, round(amount * most))
    limit = min(most, amount or math.inf)
    total = None if math.isinf(limit) else int(limit)

    def one_pass() -> Iterator[tuple[int, Any]]:
        fresh = type(combined)(combined.iterables, combined._mode)  # the loop iterates over the other one
        yield from ((index, batch) for batch, index, _ in itertools.islice(iter(fresh), total))

    batches = itertools.chain.from_iterable(one_pass() for _ in range(passes))
    shown = trainer.progress_bar_callback is not None and trainer.is_global_zero
    number = None if total is None else total * passes

    def shown_batches() -> Iterator[tuple[int, Any]]:
        with generators_kept(combined.flattened):
            console = Console()
            for index, batch in track(batches, title, number, console=console, transient=True, disable=not shown):
                yield index, transferred(trainer, module, batch)

    return shown_batches()


class SkippedBatchError(Exception):
    """A training_step returned None: the user skips this batch."""


def see_batches(
    see: Callable[[Callable[[], Any]], None],
    step: Callable[[Any, int], Any],
    pl_module: LightningModule,
    batches: Iterable[tuple[int, Any]],
) -> None:
    """Show every batch that the training_step does not skip.

    Raises:
        ScoreError: it skips all of them.
    """
    shown = skipped = 0
    for batch_idx, batch in batches:
        try:
            see(lambda: loss_of(step(batch, batch_idx), pl_module))  # noqa: B023
            shown += 1
        except SkippedBatchError:
            skipped += 1
    if skipped and not shown and pl_module.trainer.world_size == 1:  # else another process may have seen some
        raise ScoreError(
            f"{type(pl_module).__name__}.training_step returned NoneType, not a loss, for all {skipped} batches: it "
            "skips them all, or lacks a return; there is nothing to score on"
        )


def loss_of(output: Any, pl_module: LightningModule) -> Tensor:
    """What a training_step returned, as a loss; `SkippedBatchError` where it returned none."""
    if output is None:
        raise SkippedBatchError
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, Tensor):
        raise ScoreError(
            f"{type(pl_module).__name__}.training_step returned {type(output).__name__}, not a loss; gradients are "
            "scored on the loss it returns (a tensor, or a dict with the key 'loss')"
        )
    return loss


def check_fresh_iterators(trainer: Trainer) -> None:
    """Refuse loaders that cannot be read a second time while the training loop reads them."""
    combined: Any = trainer.fit_loop._combined_loader
    for loader in combined.flattened if combined is not None else ():
        if getattr(loader, "persistent_workers", False):
            raise CallbackError(
                "a schedule that counts batches scores in the middle of an epoch, which loaders with "
                "persistent_workers=True cannot do: their workers serve one iterator at a time; use "
                "persistent_workers=False, or a schedule that counts epochs"
            )
