"""Schedules: what goes when, and what may come back."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from pytorch_lightning import Callback

from lightning_prune.callbacks import (
    EpochTimerCallback,
    PruneCallback,
    ScoringCallback,
)
from lightning_prune.criteria import JRE, L1, LRE
from lightning_prune.criteria.base import WeightCriterion
from lightning_prune.criteria.scoring import score
from lightning_prune.errors import CallbackError, NoEffectWarning, PlanError
from lightning_prune.graph import trace
from lightning_prune.measure import count_flops
from lightning_prune.reconstruction.masks import masked_entries
from lightning_prune.reconstruction.small_model import reconstruct
from lightning_prune.schedule import Gradual, Rounds, Soft
from lightning_prune.selection import Budget, GlobalRatio, LayerRatio, Selection
from tests.callbacks.helpers import Task, fit, params
from tests.callbacks.test_refusals import refused
from tests.zoo import images


def test_rounds_remove_a_fixed_number_and_score_again() -> None:
    task = Task()
    callback = PruneCallback(JRE(), ratio=0.5, schedule=Rounds(8, epochs=2), reconstruct="before")
    seen = []

    class Watch(EpochTimerCallback):
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


class Gone(Callback):
    """Where training stood after every step: (epoch, batch of the epoch, channels gone)."""

    def __init__(self, prune: PruneCallback) -> None:
        self.prune = prune
        self.seen: list[tuple[int, int, int]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        gone = sum(len(group.removed) for group in self.prune.masking.plan.groups.values())
        if len(self.seen) < self.prune.masking.round:
            self.seen.append((trainer.current_epoch, batch_idx, gone))


def test_rounds_of_batches_with_an_intensive_one_now_and_then() -> None:
    rounds = Rounds(1, batches=3, intensive_every=2, intensive_epochs=1)
    prune = PruneCallback("taylor_fo", selection=GlobalRatio(5 / 36, over="groups"), schedule=rounds)
    task = Task()
    groups = sum(group.size for group in trace(task, images(2)).prunable_groups)
    prune.masking.selection.ratio = 5 / groups
    gone = Gone(prune)
    fit(task, prune, gone, epochs=6)  # of 4 batches
    # 3 batches, 1 whole epoch from the next on, 3 batches, 1 whole epoch, done
    assert gone.seen == [(0, 0, 1), (0, 3, 2), (2, 0, 3), (2, 3, 4), (4, 0, 5)]
    assert prune.reconstruction.lossless.passed


def test_a_ramp_ends_at_the_selection_whatever_it_counts() -> None:
    for selection in (LayerRatio(0.5, overrides={"*a*": 0.25}), Budget(flops=0.5), Budget(params=0.4)):
        task, once = Task(), Task()
        dense = count_flops(task, images(2))
        prune = PruneCallback("l1", selection=selection, schedule=Gradual(rounds=3))
        gone = Gone(prune)
        fit(task, prune, gone, epochs=4)
        assert [entry[:2] for entry in gone.seen] == [(0, 0), (1, 0), (2, 0)]
        assert gone.seen[0][2] >= 0.6 * gone.seen[2][2]  # cubic: most goes early
        fit(once, PruneCallback("l1", selection=selection), epochs=1)
        assert abs(count_flops(task, images(2)) - count_flops(once, images(2))) < 0.05 * dense


class Everything(Selection):
    """Cannot be asked for less."""

    def _kept(self, question):
        return question.ranked


def test_shares_of_a_ramp() -> None:
    linear = Gradual(rounds=4, shape="linear").steps(GlobalRatio(0.8), None)
    assert [round(step.selection.ratio, 6) for step in linear] == [0.2, 0.4, 0.6, 0.8]
    with pytest.raises(PlanError, match="shape must be one of cubic, linear, got 'round'"):
        Gradual(shape="round")
    with pytest.raises(PlanError, match="depends on the machine"):
        Gradual().steps(Budget(latency_ms=3), None)
    with pytest.raises(PlanError, match="cannot be spread over several steps"):
        Gradual().steps(Everything(), None)
    with pytest.raises(PlanError, match="Soft: times must be an integer of at least 1, got 0"):
        Soft(times=0)


@pytest.mark.parametrize("coupling", ["joint", "union"])
def test_reconstruction_at_every_step_computes_the_same_as_at_the_last(coupling: str) -> None:
    first, second = Task("adamw"), Task("adamw")
    second.load_state_dict(first.state_dict())
    sizes = []

    class Sizes(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 0:
                sizes.append(params(pl_module))

    schedule = Gradual(rounds=3, shape="linear")
    before, during = (
        PruneCallback("bn_scale", 0.6, coupling=coupling, schedule=schedule, reconstruct=when)
        for when in ("before", "during")
    )
    fit(first, before, epochs=4)
    fit(second, during, Sizes(), epochs=4)
    assert sizes[0] > sizes[1] > sizes[2] == sizes[3]
    assert during.reconstruction.lossless.passed
    if coupling == "joint":  # under union, filters that an addition keeps train again from the first step on
        assert before.masking.plan == during.masking.plan
        for key, value in second.state_dict().items():
            assert torch.allclose(first.state_dict()[key].double(), value.double(), rtol=1e-8, atol=1e-8), key


def test_a_budget_is_met_by_steps_that_are_each_reconstructed() -> None:
    task = Task()
    dense = count_flops(task, images(2))
    prune = PruneCallback("l1", selection=Budget(flops=0.5), schedule=Gradual(rounds=3), reconstruct="during")
    fit(task, prune, epochs=3)
    assert 0.45 < count_flops(task, images(2)) / dense <= 0.5


@pytest.mark.parametrize("hold", [False, True])
def test_soft_masks_train_again_unless_held_and_stay_in_the_end(hold: bool) -> None:
    prune = PruneCallback("l2", 0.5, schedule=Soft(times=3, hold=hold), reconstruct="after")
    zero: list[bool] = []
    plans = []

    class Watch(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            plans.append(prune.masking.plan)
            zero.append(is_zero(pl_module))

        def on_train_epoch_end(self, trainer, pl_module):
            zero.append(is_zero(pl_module))

    def is_zero(module) -> bool:
        named = dict(module.named_parameters())
        return all(
            not named[item.parameter].index_select(item.dim, item.entries).any()
            for item in masked_entries(prune.scoring.graph, replace(plans[-1], batch_norm=prune.masking.done))
        )

    task = Task()
    fit(task, prune, Watch(), epochs=4)
    assert len(plans) == 4
    assert zero[::2] == [True] * 4
    assert zero[1::2] == [hold, hold, True, True]  # the last choice is held in any case
    assert prune.reconstruction.lossless.passed


def test_what_was_masked_softly_may_come_back() -> None:
    """Scores that turn round from choice to choice."""

    class Turning(WeightCriterion):
        calls = 0
        combine = "mean"
        normalize = "none"

        def channel_scores(self, rows):
            Turning.calls += 1
            order = 1 + torch.arange(len(rows), dtype=torch.float64)
            return order if Turning.calls <= layers else order.flip(0)

    task = Task(name="Vgg")
    graph = trace(task, images(2))
    layers = sum(len(group.layers) for group in graph.prunable_groups)
    prune = PruneCallback(Turning(), selection=LayerRatio(0.5), schedule=Soft(times=2))
    plans = []

    class Watch(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            plans.append(prune.masking.plan)

    fit(task, prune, Watch(), epochs=2)
    back = [set(group.removed) & set(plans[1].groups[name].keep) for name, group in plans[0].groups.items()]
    assert any(back)


def test_soft_choices_cannot_be_reconstructed_one_by_one() -> None:
    prune = PruneCallback("l2", 0.5, schedule=Soft(), reconstruct="during")
    refused(Task(), prune, error=CallbackError, match="chooses among all channels every time")


def test_training_that_ends_before_the_schedule_says_so() -> None:
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = True

    task = Task()
    prune = PruneCallback("l1", 0.5, schedule=Gradual(rounds=3), reconstruct="after")
    with pytest.warns(NoEffectWarning, match="training ended after step 1 of 3"):
        fit(task, prune, Stop(), epochs=5)
    assert prune.reconstruction.lossless.passed  # what was masked is reconstructed


def test_a_warm_up_comes_first_if_asked_for() -> None:
    task = Task()
    dense, sizes = params(task), []

    class Sizes(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            sizes.append(params(pl_module))

    prune = PruneCallback(JRE(), 0.5, start=2)
    fit(task, prune, Sizes(), epochs=3)
    assert sizes[:8] == [dense] * 8
    assert sizes[8:] == [params(task)] * 4
    assert params(task) < dense
    assert [epoch for epoch, _ in prune.scoring.history] == [2]


def test_pruning_when_training_is_over_trains_as_if_there_were_none() -> None:
    pruned, plain = Task(), Task()
    plain.load_state_dict(pruned.state_dict())
    prune = PruneCallback(JRE(), 0.5, start="end", reconstruct="after")
    fit(pruned, prune)
    fit(plain)
    graph = trace(plain, images(2))
    small = reconstruct(plain, graph, prune.masking.plan)
    assert all(torch.equal(value, small.state_dict()[key]) for key, value in pruned.state_dict().items())
    assert params(pruned) < params(plain)


def test_a_share_of_the_data_is_scored_on() -> None:
    seen = []

    class Counting(Task):
        def training_step(self, batch, batch_idx):
            seen.append(batch_idx)
            return super().training_step(batch, batch_idx)

    fit(Counting(), ScoringCallback(LRE(), score_batches=0.5, score_epochs=2), epochs=0)
    assert seen[-4:] == [0, 1] * 2
    assert set(seen[:-4]) == {0}  # tracing
    for amount in (0, 1.0, -0.5, True):
        with pytest.raises(CallbackError, match="score_batches must be at least 1"):
            ScoringCallback(LRE(), score_batches=amount)


def test_given_scores_take_the_place_of_the_first_pass(tmp_path) -> None:
    task = Task()
    graph = trace(task, images(2))
    scores = score(task, graph, "l1")
    scores.save(tmp_path / "scores.pt")
    prune = PruneCallback("random", selection=LayerRatio(0.5), scores=tmp_path / "scores.pt")
    fit(task, prune, epochs=1)
    assert prune.masking.plan == LayerRatio(0.5).select(graph, scores)
