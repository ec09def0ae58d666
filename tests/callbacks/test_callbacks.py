"""Pruning inside Trainer.fit: moments, masks and optimizers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_prune.callbacks import (
    EpochTimerCallback,
    MaskingCallback,
    PruneCallback,
    ReconstructionCallback,
    ScoringCallback,
)
from lightning_prune.criteria import JRE, L1, LRE
from lightning_prune.criteria.scoring import score
from lightning_prune.errors import PlanError
from lightning_prune.measure import count_flops
from lightning_prune.reconstruction.lossless import check_lossless
from lightning_prune.reconstruction.small_model import reconstruct
from lightning_prune.selection import Budget, GlobalRatio, LayerRatio
from tests.callbacks.helpers import Task, fit, loader, params, trainer
from tests.zoo import images


@pytest.mark.parametrize("coupling", ["joint", "union"])
@pytest.mark.parametrize("reconstruct_", ["before", "after"])
def test_prune_callback_leaves_a_smaller_lossless_model(reconstruct_: str, coupling: str) -> None:
    task = Task()
    dense = params(task)
    callback = PruneCallback(JRE(), ratio=0.5, coupling=coupling, reconstruct=reconstruct_, monitor="val_loss")
    fit(task, callback)
    assert params(task) < 0.8 * dense
    assert callback.reconstruction.lossless.passed
    assert callback.reconstruction.lossless.dtype == "float64"
    assert [record.epoch for record in callback.reconstruction.records] == [0, 1]
    assert all(record.accuracy is not None for record in callback.reconstruction.records)
    assert not any(module._forward_pre_hooks for module in task.modules())
    assert not any(parameter._backward_hooks for parameter in task.parameters())
    assert torch.isfinite(task(images())).all()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_masked_entries_are_zero_at_every_forward_of_order_a(optimizer: str) -> None:
    task = Task(optimizer)
    callback = PruneCallback(L1(), 0.5, reconstruct="after")
    task.handle_of = lambda: callback.masking.handle  # a function, since copies of the module would copy the callback
    fit(task, callback, gradient_clip_val=1.0)
    assert len(task.masked_at_forward) == 8
    assert all(task.masked_at_forward)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_both_orders_end_with_the_same_weights(optimizer: str) -> None:
    first = Task(optimizer)
    second = copy.deepcopy(first)
    a, b = (PruneCallback(JRE(), 0.5, reconstruct=when) for when in ("after", "before"))
    fit(first, a)
    fit(second, b)
    assert a.masking.plan == b.masking.plan
    for key, value in second.state_dict().items():
        assert torch.allclose(first.state_dict()[key].double(), value.double(), rtol=1e-8, atol=1e-8), key


def test_never_keeps_the_masks_and_the_plan() -> None:
    task = Task()
    callback = PruneCallback("l1", 0.5, reconstruct="never")
    dense = params(task)
    fit(task, callback)
    assert params(task) == dense
    assert callback.masking.handle.is_zero()
    small = reconstruct(task, callback.scoring.graph, callback.masking.plan)
    assert check_lossless(task, small, images()).passed


def test_scores_are_those_of_the_plain_function_and_training_is_not_disturbed() -> None:
    task = Task()
    callback = ScoringCallback(JRE())
    batches = list(loader(shuffle=False))
    runner = trainer(callback, epochs=1)
    plain = copy.deepcopy(task)
    runner.fit(task, loader(shuffle=False), loader(8, shuffle=False))
    expected = score(plain, callback.graph, JRE(), batches, lambda m, b: F.cross_entropy(m.net(b[0]), b[1]))
    for name, values in expected.items():
        assert torch.allclose(callback.scores[name], values, rtol=1e-12)
    without = copy.deepcopy(plain)
    trainer(epochs=1).fit(without, loader(shuffle=False), loader(8, shuffle=False))
    assert all(torch.equal(v, without.state_dict()[k]) for k, v in task.state_dict().items())


def test_scoring_uses_no_randomness_of_the_training_run() -> None:
    first, second = Task(), Task()
    fit(first, ScoringCallback(JRE(), score_epochs=2, bn_mode="train"))
    fit(second)
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())


def test_score_batches_and_epochs_limit_the_pass() -> None:
    calls = []

    class Counting(Task):
        def training_step(self, batch, batch_idx):
            calls.append(batch_idx)
            return super().training_step(batch, batch_idx)

    callback = ScoringCallback(LRE(), score_batches=3.0, score_epochs=2)  # as YAML may have it
    fit(Counting(), callback, epochs=0)
    assert calls[-6:] == [0, 1, 2] * 2
    assert set(calls[:-6]) == {0}  # tracing


def test_scoring_while_training_masks_after_the_scored_epochs() -> None:
    task = Task()
    dense = params(task)
    sizes = []

    class Sizes(EpochTimerCallback):
        def on_train_epoch_start(self, trainer, pl_module):
            super().on_train_epoch_start(trainer, pl_module)
            sizes.append(params(pl_module))

    callback = PruneCallback(JRE(), 0.5, update_weights=True, score_epochs=1, reconstruct="before")
    fit(task, callback, Sizes(), epochs=3)
    assert sizes[0] == dense
    assert sizes[1] == sizes[2] < dense
    assert callback.reconstruction.lossless.passed


def test_three_callbacks_by_hand_are_the_composed_one() -> None:
    first, second = Task(), Task()
    fit(first, PruneCallback(L1(), selection=LayerRatio(0.5)))
    fit(second, ScoringCallback(L1()), MaskingCallback(LayerRatio(0.5)), ReconstructionCallback("before"))
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())


def test_optimizer_state_is_cut_with_the_weights_in_order_a() -> None:
    task = Task("adamw")
    runner = fit(task, PruneCallback(L1(), 0.5, reconstruct="after"))
    state = runner.optimizers[0].state
    assert state
    assert all(state[p]["exp_avg"].shape == p.shape for p in task.parameters())


def test_a_lossy_ablation_runs_and_says_so() -> None:
    callback = PruneCallback(L1(), selection=LayerRatio(0.5), coupling="intersection", reconstruct="before")
    fit(Task(), callback, epochs=1)
    assert not callback.reconstruction.lossless.passed
    off = PruneCallback(L1(), selection=LayerRatio(0.5), batch_norm=False, reconstruct="before")
    fit(Task(), off, epochs=1)
    assert off.reconstruction.lossless.max_rel_error > 1e-3


class Normalised(Task):
    """A layer norm over the channels that are read."""

    def __init__(self) -> None:
        super().__init__(name="Plain")
        self.net.b = torch.nn.Sequential(self.net.b, torch.nn.GroupNorm(1, 6, dtype=torch.float64))


def test_channels_under_a_statistic_go_by_choice_and_with_loss() -> None:
    prune = PruneCallback("l1", statistics=True, selection=LayerRatio(0.5))
    task = Normalised()
    fit(task, prune)
    assert task.net.b[0].out_channels == 3
    assert not prune.reconstruction.lossless.passed
    strict = PruneCallback("l1", selection=LayerRatio(0.5))
    fit(task := Normalised(), strict)
    assert task.net.b[0].out_channels == 6


def test_epoch_timer_keeps_evaluation_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 101.0, 104.0, 106.0, 110.0])  # setup, epoch start, validation start and end, epoch end
    monkeypatch.setattr("lightning_prune.callbacks.timing.time.perf_counter", lambda: next(clock))
    timer = EpochTimerCallback()
    runner = type("T", (), {"callback_metrics": {}, "current_epoch": 0})()
    timer.setup(runner, None, "fit")
    timer.on_train_epoch_start(runner, None)
    timer.on_validation_start(runner, None)
    timer.on_validation_end(runner, None)
    timer.on_train_epoch_end(runner, None)
    record = timer.records[0]
    assert (record.train_seconds, record.eval_seconds, record.elapsed_seconds) == (7.0, 2.0, 10.0)


def test_a_selection_of_another_ratio_wins() -> None:
    assert PruneCallback(L1(), ratio=0.1, selection=GlobalRatio(0.3)).masking.selection.ratio == 0.3


def test_what_was_done_is_said(caplog: pytest.LogCaptureFixture) -> None:
    task = Task()
    dense = params(task)
    with caplog.at_level("INFO", logger="pytorch_lightning"):
        fit(task, PruneCallback(L1(), ratio=0.5), epochs=1)
    assert "Masked 30 of 60 channels of all prunable layers" in caplog.text
    assert f"{dense:,} to {params(task):,} parameters; lossless, relative error" in caplog.text


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_budget_is_met_inside_fit(when) -> None:
    task = Task()
    dense = count_flops(task, images(2))
    prune = PruneCallback("l1", selection=Budget(flops=0.5), reconstruct=when)
    trainer(prune, epochs=1).fit(task, loader(), loader(shuffle=False))
    assert 0.45 < count_flops(task, images(2)) / dense <= 0.5  # a channel of this small model is worth 3%
    assert prune.reconstruction.lossless.passed


def test_a_budget_that_cannot_be_met_stops_fit_before_any_weight_is_touched() -> None:
    task = Task()
    before = copy.deepcopy(task.state_dict())
    with pytest.raises(PlanError, match="The nearest that can be met is"):
        trainer(PruneCallback("l1", selection=Budget(flops=0.001))).fit(task, loader(), loader(shuffle=False))
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.state_dict().items())


def test_modules_of_the_task_may_be_ignored():
    task = Task()
    selection = LayerRatio(0.5, ignore=[task.net.stem], overrides={task.net.a1: 0.25})
    callback = PruneCallback("l1", selection=selection, reconstruct="never")
    fit(task, callback, epochs=1)
    plan = callback.masking.plan
    assert plan.groups
    assert not any("stem" in layer for group in plan.groups.values() for layer in group.layers)


def test_channels_that_are_told_of_are_filters_where_several_go_together(caplog):
    class Grouped(Task):
        def __init__(self):
            super().__init__()
            body = nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 24, 3)
            self.net = nn.Sequential(*body, nn.Flatten(), nn.Linear(384, 5)).double()

    task = Grouped()
    with caplog.at_level("INFO", logger="pytorch_lightning"):
        fit(task, PruneCallback(L1(), selection=LayerRatio(0.5)), epochs=1)
    filters = task.net[0].out_channels + task.net[3].out_channels
    assert f"Masked {40 - filters} of 40 channels" in caplog.text
