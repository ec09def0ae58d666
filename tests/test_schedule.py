"""Schedules: what goes when, and what may come back."""

from __future__ import annotations

import itertools

import pytest

from lightning_prune.callbacks import (
    EpochTimer,
    PruneCallback,
)
from lightning_prune.criteria import JRE, L1
from lightning_prune.errors import CallbackError, PlanError
from lightning_prune.schedule import Rounds
from lightning_prune.selection import LayerRatio
from tests.helpers_fit import Task, fit, params
from tests.test_callbacks_refusals import refused


def test_rounds_remove_a_fixed_number_and_score_again() -> None:
    task = Task()
    callback = PruneCallback(JRE(), ratio=0.5, schedule=Rounds(8, epochs=2), reconstruct="before")
    seen = []

    class Watch(EpochTimer):
        def on_train_epoch_start(self, trainer, pl_module):
            plan = callback.masking.plan
            groups = callback.scoring.graph
            gone = {(name, channel) for name, group in plan.groups.items() for channel in group.removed}
            filters = sum(len(g.removed) * len(groups.group(name).layers) for name, g in plan.groups.items())
            seen.append((callback.masking.round, filters, gone, params(pl_module)))

    fit(task, callback, Watch(), epochs=7)
    rounds = [entry[0] for entry in seen]
    assert rounds == [1, 1, 2, 2, 3, 3, 4]  # 60 filters, half of them in rounds of 8
    counts = [entry[1] for entry in seen[::2]]
    assert all(8 * (k + 1) - 1 <= min(count, 30) <= 8 * (k + 1) for k, count in enumerate(counts[:3]))
    assert all(earlier[2] <= later[2] for earlier, later in itertools.pairwise(seen))
    assert [entry[3] for entry in seen][:6] == [seen[0][3]] * 6
    assert seen[6][3] < seen[0][3]
    assert callback.reconstruction.lossless.passed


def test_rounds_that_do_not_fit_into_the_epochs_are_refused() -> None:
    rounds = Rounds(8, epochs=2)
    refused(
        Task(), PruneCallback(L1(), schedule=rounds), error=CallbackError, match="need max_epochs of at least 7, got 2"
    )
    callback = PruneCallback(L1(), selection=LayerRatio(0.5), schedule=rounds)
    refused(Task(), callback, error=PlanError, match="need GlobalRatio")
    with pytest.raises(PlanError, match="at least 1, got 0"):
        Rounds(0)
