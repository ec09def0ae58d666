"""Sparse training in a Trainer: the steps it leads to, who shrinks and who is pruned, resuming, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_prune as lp
from lightning_prune.callbacks import GroupSparsityCallback, PruneCallback
from lightning_prune.callbacks.random_state import RandomStateCallback
from lightning_prune.criteria import GroupSparsity, condemned_strengths, importance_strengths
from lightning_prune.errors import CallbackError, ScoreError
from lightning_prune.selection import LayerRatio
from tests import zoo
from tests.callbacks.helpers import Task, fit, loader, trainer
from tests.callbacks.test_refusals import refused
from tests.criteria.helpers import Task as PlainTask
from tests.criteria.helpers import train

HALF = LayerRatio(0.5)


def norms(task: Task, graph: lp.ChannelGraph) -> dict[str, torch.Tensor]:
    """Squared norm of each channel with all that goes with it, {group: (channels,)}."""
    found = {}
    for group in graph.prunable_groups:
        basis = torch.eye(group.size, dtype=torch.float64)
        found[group.name] = torch.stack([2 * GroupSparsity(task, graph, {group.name: row}).value() for row in basis])
    return found


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("selection", [None, HALF])
@pytest.mark.parametrize("criterion", ["l2", "taylor_fo"])
def test_training_is_that_by_hand(criterion: str, selection: LayerRatio | None, accumulate: int) -> None:
    callback = GroupSparsityCallback(
        0.3, selection=selection, criterion=criterion, alpha=2.0, example_inputs=zoo.images(), score_batches=1
    )
    found = train(PlainTask(), [callback], accumulate_grad_batches=accumulate)
    task = PlainTask()
    graph = lp.trace(task, zoo.images())
    first = [(zoo.images(8)[:4], torch.arange(4))]
    scores = lp.score(task, graph, criterion, first, lambda task, batch: F.cross_entropy(task(batch[0]), batch[1]))
    by_score, by_plan = importance_strengths(scores, 2.0), condemned_strengths(HALF.select(graph, scores))
    penalty = GroupSparsity(task, graph, by_score if selection is None else by_plan)
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    images, labels = zoo.images(8), torch.arange(8) % 5
    for number, (x, y) in enumerate(zip(images.split(4), labels.split(4), strict=True), 1):
        (F.cross_entropy(task(x), y) / accumulate).backward()
        if number % accumulate == 0:
            penalty.add_(0.3 * (1 if selection is None else number / 2))  # the ramp is the one epoch of two batches
            optimizer.step()
            optimizer.zero_grad()
    for name, parameter in task.net.named_parameters():
        torch.testing.assert_close(found[name], parameter.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("criterion", ["l2", "taylor_fo"])
def test_with_two_optimizers_every_parameter_is_penalised_once(criterion: str) -> None:
    found, expected = (
        train(PlainTask(manual=manual), [GroupSparsityCallback(0.3, criterion=criterion, example_inputs=zoo.images())])
        for manual in (True, False)
    )
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name], parameter, rtol=1e-10, atol=1e-12)


def test_the_condemned_shrink_the_others_stay_and_the_condemned_are_pruned() -> None:
    task = Task()
    graph = lp.trace(task, task.example_input_array)
    callback = GroupSparsityCallback(3.0, selection=HALF, renew=False)
    runner = fit(task, callback, epochs=5)
    after, condemned = norms(task, graph), callback._strengths
    plain = Task()
    fit(plain, epochs=5)
    without = norms(plain, graph)
    for name, values in after.items():
        gone = condemned[name].bool()
        assert int(gone.sum()) == len(values) // 2
        assert (values[gone] < 0.1 * without[name][gone]).all()
        assert (values[~gone] > 0.2 * without[name][~gone]).all()  # the weights between kept and condemned are shared
    assert 0 < runner.callback_metrics["condemned_norm"] < 0.1
    assert runner.callback_metrics["group_sparsity"] > 0
    both, prune = Task(), PruneCallback("l2", selection=HALF, start=5)
    callback = GroupSparsityCallback(3.0, selection=HALF, renew=False)
    fit(both, callback, prune, epochs=6)
    plan = prune.masking.plan
    assert plan is not None
    assert condemned_strengths(plan).keys() == condemned.keys()
    assert all(torch.equal(values, condemned[name]) for name, values in condemned_strengths(plan).items())
    assert prune.reconstruction.lossless.passed


class Recorded(GroupSparsityCallback):
    """Remembers its rankings."""

    ranked: tuple[dict[str, torch.Tensor], ...] = ()

    def _rank(self, trainer, pl_module):
        found = super()._rank(trainer, pl_module)
        self.ranked += (found,)
        return found


@pytest.mark.parametrize("renew", [True, False])
def test_channels_are_ranked_again_every_epoch_or_once(renew: bool) -> None:
    task, sparse = Task(), Recorded(0.1, renew=renew)
    graph = lp.trace(task, task.example_input_array)
    fit(task, sparse, epochs=3)
    assert len(sparse.ranked) == (3 if renew else 1)
    in_force = GroupSparsity(task, graph, sparse.ranked[-1]).value()
    assert torch.equal(sparse._penalty.value(), in_force)
    if renew:
        assert not torch.equal(GroupSparsity(task, graph, sparse.ranked[-2]).value(), in_force)


class Gradients(Callback):
    """The gradients before an optimizer step, as the next callback finds them."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append(torch.cat([p.grad.flatten() for p in pl_module.parameters() if p.grad is not None]))


@pytest.mark.parametrize("order", [0, 1])
def test_it_acts_from_its_start_until_the_model_is_pruned(order: int) -> None:
    before, after = Gradients(), Gradients()
    sparse, prune = GroupSparsityCallback(0.1, start=1), PruneCallback("l2", 0.5, start=2)
    fit(Task(), before, *((sparse, prune) if order else (prune, sparse)), after, epochs=3)
    changed = [not torch.equal(a, b) for a, b in zip(before.seen, after.seen, strict=True)]
    assert changed == 4 * [False] + 4 * [True] + 4 * [False]
    assert sparse._penalty is None


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision(precision: str) -> None:
    task = Task()
    task.net.float()
    task.example_input_array = zoo.images(2).float()
    data = DataLoader(TensorDataset(zoo.images(8).float(), torch.arange(8) % 5), 4)
    before, after = Gradients(), Gradients()
    runner = trainer(before, GroupSparsityCallback(0.1, selection=HALF), after, epochs=1, precision=precision)
    runner.fit(task, data, data)
    assert not torch.equal(before.seen[0], after.seen[0])
    assert after.seen[0].dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
    assert 0 < runner.callback_metrics["condemned_norm"] < 1


def test_with_a_gradient_scaler_the_penalty_meets_unscaled_gradients() -> None:
    class Plain(Task):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    task = Plain()
    task.net.float()
    task.example_input_array = zoo.images(2).float()
    before = task.net.a1[0].weight.detach().clone()
    data = DataLoader(TensorDataset(zoo.images(4).float(), torch.arange(4)), 4)
    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    trainer(GroupSparsityCallback(50.0, alpha=0.0), epochs=1, plugins=scaled).fit(task, data, data)
    left = (task.net.a1[0].weight.detach() / before).median()
    assert abs(left) < 0.05  # 1 - 0.01 * 50 as filters, and as much less as weights that read others


def sparse_run(task: Task, folder: Path, ckpt: Path | None = None, *, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    callback = GroupSparsityCallback(0.3, selection=HALF, **options)
    prune = PruneCallback(callback.criterion, selection=HALF, start=3)
    saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, monitor="val_loss")
    runner = trainer(callback, prune, saving, epochs=4, enable_checkpointing=True)
    runner.fit(task, loader(), loader(8, shuffle=False), ckpt_path=ckpt)
    return callback, prune


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(("renew", "criterion"), [(True, "taylor_fo"), (False, "l2")])
def test_a_resumed_run_goes_on_bit_for_bit(renew: bool, criterion: str, tmp_path: Path) -> None:
    whole = Task()
    start = {name: value.clone() for name, value in whole.state_dict().items()}
    first, pruned = sparse_run(whole, tmp_path / "whole", renew=renew, criterion=criterion)
    for epoch in (0, 1, 2, 3):
        task = Task()
        task.load_state_dict(start)
        ckpt = tmp_path / "whole" / f"epoch={epoch}.ckpt"
        second, prune = sparse_run(task, tmp_path / "resumed", ckpt, seed=1, renew=renew, criterion=criterion)
        assert all(torch.equal(value, whole.state_dict()[name]) for name, value in task.state_dict().items())
        assert prune.masking.plan == pruned.masking.plan
        assert second._ranked_in == first._ranked_in
        assert all(torch.equal(values, first._strengths[name]) for name, values in second._strengths.items())


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_run_resumed_inside_an_epoch_keeps_to_the_same_channels(tmp_path: Path) -> None:
    def run(task: Task, callback: Callback, ckpt: Path | None = None) -> None:
        torch.manual_seed(0)
        saving = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
        runner = trainer(RandomStateCallback(), callback, saving, epochs=1, enable_checkpointing=True)
        runner.fit(task, batches, loader(8, shuffle=False), ckpt_path=ckpt)

    data = TensorDataset(zoo.images(4).repeat(4, 1, 1, 1), (torch.arange(4) % 5).repeat(4))
    batches = DataLoader(data, 4)  # all the same: a run resumed inside an epoch takes its batches from the first on
    whole, resumed = Task(), Task()
    run(whole, first := GroupSparsityCallback(0.5, selection=HALF))
    resumed.net.stem[0].weight.data.zero_()
    run(resumed, second := GroupSparsityCallback(0.5, selection=HALF), tmp_path / "step=2.ckpt")
    assert all(torch.equal(values, first._strengths[name]) for name, values in second._strengths.items())
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0)


def test_settings_without_meaning_are_refused() -> None:
    with pytest.raises(ScoreError, match="strength must be a finite number >= 0, got -1"):
        GroupSparsityCallback(-1.0)
    with pytest.raises(ScoreError, match="alpha must be a finite number >= 0"):
        GroupSparsityCallback(1.0, alpha=-4.0)
    with pytest.raises(ScoreError, match="ramp must be a number of epochs"):
        GroupSparsityCallback(1.0, ramp=1.5)
    with pytest.raises(ScoreError, match="start must be a number of epochs"):
        GroupSparsityCallback(1.0, start=-1)
    with pytest.raises(CallbackError, match=r"DCP\(.* fits something to it, .* such as TaylorFO or L2"):
        GroupSparsityCallback(1.0, criterion="dcp")
    with pytest.raises(CallbackError, match=r"JRE\(.* compares with the dense model"):
        GroupSparsityCallback(1.0, criterion=lp.JRE(reference="baseline"))
    with pytest.raises(CallbackError, match="score_batches must be at least 1"):
        GroupSparsityCallback(1.0, criterion="jre", score_batches=0)
    with pytest.raises(CallbackError, match=r"selection must be a Selection such as GlobalRatio\(0.5\), got 0.5"):
        GroupSparsityCallback(1.0, selection=0.5)


def test_fits_in_which_it_cannot_work_are_refused() -> None:
    prune = PruneCallback("l2", 0.5)
    match = r"\(start=0, ramp=None\) has to be done when the model is pruned, .* at the start of epoch 0 here"
    refused(Task(), GroupSparsityCallback(1.0), prune, error=CallbackError, match=match)
    late = GroupSparsityCallback(1.0, selection=HALF, start=1, ramp=3)
    prune = PruneCallback("l2", 0.5, start=3)
    refused(Task(), late, prune, error=CallbackError, match=r"start=1, ramp=3\) .* at the start of epoch 3 here")
    endless = GroupSparsityCallback(1.0, selection=HALF)
    refused(Task(), endless, error=CallbackError, match="pass ramp=", epochs=-1, max_steps=1)
    both = GroupSparsityCallback(1.0), GroupSparsityCallback(2.0)
    refused(Task(), *both, error=RuntimeError, match="more than one stateful callback of type `GroupSparsityCallback`")


def test_a_model_without_channels_that_can_go_is_refused() -> None:
    task = Task()
    task.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).double()
    refused(task, GroupSparsityCallback(1.0), error=CallbackError, match="nothing to prune in Task: net.1 reaches")


class Elsewhere(Task):
    """Its forward gives the network something else than its training step does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x / 255)


def test_without_an_example_it_traces_with_what_the_training_step_gives_to_forward() -> None:
    told, found, refuses = Task(), Task(), Elsewhere()
    found.example_input_array = refuses.example_input_array = None
    for task in (told, found):
        fit(task, GroupSparsityCallback(1.0))
    assert all(torch.equal(tensor, told.state_dict()[name]) for name, tensor in found.state_dict().items())
    refused(refuses, GroupSparsityCallback(1.0), error=CallbackError, match="set self.example_input_array")
