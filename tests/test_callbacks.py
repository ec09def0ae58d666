"""Pruning inside Trainer.fit: moments, masks, optimizers, and what is refused before any weight is touched."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune.callbacks import (
    EpochTimer,
    MaskingCallback,
    PruneCallback,
    ReconstructionCallback,
    ScoringCallback,
)
from lightning_prune.criteria import JRE, L1, LRE
from lightning_prune.equivalence import check_lossless
from lightning_prune.errors import CallbackError, PlanError, ScoreError, TraceError
from lightning_prune.measurement import count_flops
from lightning_prune.reconstruction import reconstruct
from lightning_prune.schedule import Rounds
from lightning_prune.scoring import score
from lightning_prune.selection import Budget, ChannelsPerRound, GlobalRatio, LayerRatio
from tests.zoo import build, images


class Task(LightningModule):
    """A user's module: knows nothing of pruning, logs, and calls its network by its own name."""

    def __init__(self, optimizer: str = "sgd", name: str = "Residual") -> None:
        super().__init__()
        self.net = build(name).train()
        self.optimizer = optimizer
        self.example_input_array = images(2)
        self.masked_at_forward: list[bool] = []
        self.handle_of = None

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        if self.training and self.handle_of is not None and self.handle_of.masking.handle is not None:
            handle = self.handle_of.masking.handle
            out = self.net(x)
            self.masked_at_forward.append(handle.is_zero())
        else:
            out = self.net(x)
        loss = F.cross_entropy(out, y)
        self.log("train_loss", loss, prog_bar=True)
        self.log_dict({"twice": 2 * loss})
        return {"loss": loss}

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), 0.02, momentum=0.9, weight_decay=0.01)
        return torch.optim.AdamW(self.parameters(), 0.005, weight_decay=0.05)


def loader(count: int = 16, batch: int = 4, shuffle: bool = True) -> DataLoader:
    labels = torch.arange(count) % 5
    return DataLoader(TensorDataset(images(count), labels), batch, shuffle=shuffle)


def trainer(*callbacks, epochs: int = 2, **options) -> Trainer:
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False} | options
    return Trainer(
        max_epochs=epochs, callbacks=list(callbacks), enable_model_summary=False, accelerator="cpu", **options
    )


def params(module) -> int:
    return sum(p.numel() for p in module.parameters())


def fit(task: Task, *callbacks, seed: int = 0, **options) -> Trainer:
    torch.manual_seed(seed)
    runner = trainer(*callbacks, **options)
    runner.fit(task, loader(), loader(8, shuffle=False))
    return runner


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
    task.handle_of = callback
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

    fit(Counting(), ScoringCallback(LRE(), score_batches=3, score_epochs=2), epochs=0)
    assert calls == [0, 1, 2] * 2


def test_scoring_while_training_masks_after_the_scored_epochs() -> None:
    task = Task()
    dense = params(task)
    sizes = []

    class Sizes(EpochTimer):
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
    timer = EpochTimer()
    runner = type("T", (), {"callback_metrics": {}, "current_epoch": 0})()
    timer.setup(runner, None, "fit")
    timer.on_train_epoch_start(runner, None)
    timer.on_validation_start(runner, None)
    timer.on_validation_end(runner, None)
    timer.on_train_epoch_end(runner, None)
    record = timer.records[0]
    assert (record.train_seconds, record.eval_seconds, record.elapsed_seconds) == (7.0, 2.0, 10.0)


def refused(task, *callbacks, error, match: str, **options) -> None:
    before = {key: value.clone() for key, value in task.state_dict().items()}
    with pytest.raises(error, match=match):
        fit(task, *callbacks, **options)
    assert all(torch.equal(value, before[key]) for key, value in task.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in task.modules())
    assert not any(parameter._backward_hooks for parameter in task.parameters())


def test_an_order_that_cannot_work_is_refused() -> None:
    score_, mask, rebuild = ScoringCallback(L1()), MaskingCallback(), ReconstructionCallback()
    refused(Task(), mask, score_, error=CallbackError, match="ScoringCallback comes after it: swap them")
    refused(Task(), mask, error=CallbackError, match="there is none: add it, or use PruneCallback")
    refused(Task(), ScoringCallback(L1()), rebuild, error=CallbackError, match="needs a MaskingCallback before it")


def test_no_training_step_or_no_loss_is_refused() -> None:
    class NoStep(Task):
        training_step = LightningModule.training_step

    class NoLoss(Task):
        def training_step(self, batch, batch_idx):
            return None

    class Vector(Task):
        def training_step(self, batch, batch_idx):
            return self.net(batch[0]).sum(1)

    with pytest.raises((ScoreError, Exception), match="training_step"):
        fit(NoStep(), PruneCallback(JRE()))
    refused(
        NoLoss(), PruneCallback(JRE()), error=ScoreError, match="NoLoss.training_step returned NoneType, not a loss"
    )
    refused(Vector(), PruneCallback(JRE()), error=ScoreError, match="must be a scalar tensor")


def test_missing_or_wrong_example_inputs_are_refused() -> None:
    task = Task()
    task.example_input_array = None
    refused(task, PruneCallback(L1()), error=CallbackError, match="set self.example_input_array")
    refused(
        Task(), PruneCallback(L1(), example_inputs=images()[:, :2]), error=TraceError, match="in module 'net.stem.0'"
    )


def test_nothing_to_prune_is_refused_with_the_reasons() -> None:
    class Single(Task):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 5).double())

    refused(Single(), PruneCallback(L1()), error=CallbackError, match="net.1 reaches the model's output")


def test_scores_that_are_not_finite_are_refused() -> None:
    task = Task()
    with torch.no_grad():
        task.net.a1[0].weight[3] = torch.nan
    refused_match = r"net\.a1\.0.*NaN"
    with pytest.raises(ScoreError, match=refused_match):
        fit(task, PruneCallback(L1()))


@pytest.mark.parametrize("ratio", [1.0, -0.1, 1.5, float("nan"), "half", True])
def test_a_ratio_outside_its_range_is_refused_at_once(ratio) -> None:
    with pytest.raises(PlanError, match=r"in \[0, 1\), got"):
        PruneCallback(L1(), ratio=ratio)


def test_wrong_words_are_refused_at_once() -> None:
    with pytest.raises(CallbackError, match="before, after, never, got 'later'"):
        PruneCallback(L1(), reconstruct="later")
    with pytest.raises(CallbackError, match="before, after, got 'during'"):
        ReconstructionCallback("during")
    with pytest.raises(ScoreError, match="jre"):
        PruneCallback("jrr")
    with pytest.raises(PlanError, match="coupling must be one of"):
        PruneCallback(L1(), coupling="or")
    with pytest.raises(CallbackError, match="at least 1"):
        ScoringCallback(L1(), score_batches=0)


def test_several_processes_and_resuming_are_refused_for_now(tmp_path) -> None:
    task = Task()
    runner = trainer(epochs=1, default_root_dir=tmp_path)
    runner.fit(task, loader(), loader(8, shuffle=False))
    runner.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(CallbackError, match="resuming with ckpt_path"):
        trainer(PruneCallback(L1()), epochs=3).fit(
            Task(), loader(), loader(8, shuffle=False), ckpt_path=tmp_path / "a.ckpt"
        )
    several = type("T", (), {"world_size": 2, "ckpt_path": None, "callbacks": []})()
    with pytest.raises(CallbackError, match="2 processes"):
        ScoringCallback(L1()).setup(several, task, "fit")


def test_a_selection_of_another_ratio_wins() -> None:
    assert PruneCallback(L1(), ratio=0.1, selection=GlobalRatio(0.3)).masking.selection.ratio == 0.3


def test_rounds_remove_a_fixed_number_and_score_again() -> None:
    task = Task()
    callback = PruneCallback(JRE(), ratio=0.5, rounds=Rounds(8, epochs=2), reconstruct="before")
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
        Task(), PruneCallback(L1(), rounds=rounds), error=CallbackError, match="need max_epochs of at least 7, got 2"
    )
    callback = PruneCallback(L1(), selection=LayerRatio(0.5), rounds=rounds)
    refused(Task(), callback, error=PlanError, match="need GlobalRatio")
    with pytest.raises(PlanError, match="at least 1, got 0"):
        Rounds(0)


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


def test_a_number_of_channels_goes_inside_fit() -> None:
    task = Task()
    prune = PruneCallback("l1", selection=ChannelsPerRound(9, over="groups"))
    trainer(prune, epochs=1).fit(task, loader(), loader(shuffle=False))
    assert sum(len(group.removed) for group in prune.masking.plan.groups.values()) == 9


def test_a_budget_that_cannot_be_met_stops_fit_before_any_weight_is_touched() -> None:
    task = Task()
    before = copy.deepcopy(task.state_dict())
    with pytest.raises(PlanError, match="The nearest that can be met is"):
        trainer(PruneCallback("l1", selection=Budget(flops=0.001))).fit(task, loader(), loader(shuffle=False))
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.state_dict().items())
