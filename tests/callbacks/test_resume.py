"""Checkpoints of pruned runs: resuming goes on bit for bit, and every file finds its shapes again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.callbacks import PruneCallback
from lightning_prune.criteria import JRE
from lightning_prune.errors import CallbackError, CheckpointError, PlanError
from lightning_prune.reconstruction.checkpoint import PrunedCheckpoints
from lightning_prune.schedule import Gradual, Rounds, Soft
from lightning_prune.selection import LayerRatio
from tests.callbacks.helpers import Task, fit, loader, params, trainer
from tests.graph.test_code_sizes import Fused
from tests.graph.tokens import Tokens
from tests.zoo import images, randomise_

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),  # resuming does that
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
]

RUNS: dict[str, dict[str, Any]] = {
    "before": {"reconstruct": "before"},
    "after": {"reconstruct": "after"},
    "never": {"reconstruct": "never"},
    "union": {"reconstruct": "before", "coupling": "union"},
    "warm-up": {"reconstruct": "before", "start": 2},
    "while training": {"reconstruct": "before", "update_weights": True, "score_epochs": 2},
    "ramp": {"reconstruct": "before", "schedule": Gradual(3)},
    "ramp, each": {"reconstruct": "during", "schedule": Gradual(3)},
    "ramp, after": {"reconstruct": "after", "schedule": Gradual(3)},
    "rounds of batches": {"reconstruct": "during", "schedule": Rounds(8, batches=3)},
    "soft": {"reconstruct": "before", "schedule": Soft(3)},
    "soft, held": {"reconstruct": "before", "schedule": Soft(3, hold=True)},
}


class Stop(Exception):
    """Stands for whatever ends a run."""


class Interrupt(Callback):
    """Ends the run in the middle of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (self.epoch, 1):
            raise Stop


def prune(**options: Any) -> PruneCallback:
    return PruneCallback(JRE(), 0.5, **options)


def each_epoch(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_last=True, monitor="val_loss")


def run(task: Task, callback: PruneCallback, folder: Path, *others: Callback, seed: int = 0, ckpt: Any = None) -> Any:
    torch.manual_seed(seed)
    runner = trainer(callback, each_epoch(folder), *others, epochs=5, enable_checkpointing=True)
    runner.fit(task, loader(), loader(8, shuffle=False), ckpt_path=ckpt)
    return runner


def state(task: Task) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in task.state_dict().items()}


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("kind", RUNS)
def test_a_resumed_run_ends_with_the_same_weights_bit_for_bit(kind: str, tmp_path: Path) -> None:
    whole, first = Task("adamw"), prune(**RUNS[kind])
    start = state(whole)
    run(whole, first, tmp_path / "whole")
    for epoch in (0, 2):
        resumed, second = Task("adamw"), prune(**RUNS[kind])
        resumed.load_state_dict(start)
        run(resumed, second, tmp_path / "resumed", seed=1, ckpt=tmp_path / "whole" / f"epoch={epoch}.ckpt")
        assert second.masking.plan == first.masking.plan
        assert second.masking.done
        assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())
        assert len(second.scoring.history) == len(first.scoring.history)
        assert (second.reconstruction is None) == (kind == "never")
        if kind != "never":
            assert second.reconstruction.lossless.passed
            assert [record.epoch for record in second.reconstruction.records] == [0, 1, 2, 3, 4]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("at_epoch_end", [True, False], ids=["saved after training", "saved after validation"])
def test_a_step_right_after_resuming_scores_the_batches_that_the_first_run_scored(at_epoch_end, tmp_path: Path) -> None:
    def fitted(task: Task, callback: PruneCallback, folder: Path, ckpt: Path | None = None) -> dict[str, Tensor]:
        saving = {"monitor": "val_loss", "save_top_k": -1, "save_on_train_epoch_end": at_epoch_end}
        runner = trainer(
            callback, ModelCheckpoint(folder, filename="{epoch}", **saving), epochs=3, enable_checkpointing=True
        )
        torch.manual_seed(0 if ckpt is None else 1)
        runner.fit(task, loader(), loader(8, shuffle=False), ckpt_path=ckpt)
        return state(task)

    start = state(whole := Task())
    first = fitted(whole, callback := prune(start=1, score_batches=1), tmp_path / "whole")
    resumed = Task()
    resumed.load_state_dict(start)
    again = fitted(resumed, other := prune(start=1, score_batches=1), tmp_path, tmp_path / "whole" / "epoch=0.ckpt")
    assert all(
        torch.equal(a, b) for a, b in zip(callback.scoring.scores.values(), other.scoring.scores.values(), strict=True)
    )
    assert all(torch.equal(value, again[name]) for name, value in first.items())


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(("precision", "kind"), [("64-true", "before"), ("bf16-true", "after"), ("16-true", "never")])
def test_a_plan_is_resumed_in_every_precision(precision: str, kind: str, tmp_path: Path) -> None:
    """Lightning gives the module its type only once it has restored the plan, which is traced."""

    def fitted(task: Task, folder: Path, ckpt: Path | None = None) -> PruneCallback:
        task.example_input_array = task.example_input_array.float()
        callback = prune(**RUNS[kind])
        runner = trainer(callback, each_epoch(folder), enable_checkpointing=True, precision=precision)
        torch.manual_seed(0 if ckpt is None else 1)
        runner.fit(task.float(), loader(), loader(8, shuffle=False), ckpt_path=ckpt)
        return callback

    first = fitted(whole := Task(), tmp_path / "whole")
    again = fitted(resumed := Task(), tmp_path, tmp_path / "whole" / "epoch=0.ckpt")
    assert again.masking.plan == first.masking.plan
    assert next(resumed.parameters()).dtype == next(whole.parameters()).dtype != torch.float32
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


@pytest.mark.parametrize("kind", ["before", "after", "ramp, each"])
def test_every_checkpoint_can_be_tested_and_loaded(kind: str, tmp_path: Path) -> None:
    task = Task()
    runner = run(task, prune(**RUNS[kind]), tmp_path)
    end = params(task)
    losses = {}
    for epoch in range(5):
        path = tmp_path / f"epoch={epoch}.ckpt"
        (found,) = runner.validate(task, loader(8, shuffle=False), ckpt_path=path, verbose=False)
        sizes, losses[epoch] = params(task), found["val_loss"]
        fresh = Task()
        plan = lp.load(path, fresh)
        assert params(fresh) == sizes
        assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in task.state_dict().items())
        (alone,) = trainer().validate(fresh, loader(8, shuffle=False), verbose=False)
        assert alone["val_loss"] == losses[epoch]
        assert sizes >= end
        assert bool(plan.groups) == (sizes < params(Task()))
    best = min(losses, key=losses.get)
    (found,) = runner.validate(task, loader(8, shuffle=False), ckpt_path="best", verbose=False)
    assert found["val_loss"] == losses[best]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("kind", ["warm-up", "ramp, each"])
def test_a_new_process_evaluates_a_pruned_checkpoint_and_then_goes_on_with_it(
    kind: str, example: bool, tmp_path: Path
) -> None:
    """With the callbacks of the run, as its configuration has them."""
    whole, alone, task = Task(), Task(), Task()
    run(whole, first := prune(**RUNS[kind]), tmp_path / "whole")
    path = tmp_path / "whole/epoch=2.ckpt"
    lp.load(path, alone)
    (expected,) = trainer().validate(alone, loader(8, shuffle=False), verbose=False)
    if not example:
        task.example_input_array = None
    (found,) = trainer(again := prune(**RUNS[kind])).validate(
        task, loader(8, shuffle=False), ckpt_path=path, verbose=False
    )
    assert found == expected
    assert params(task) == params(alone) < params(Task())
    assert kind != "warm-up" or again.masking.plan == first.masking.plan
    with pytest.raises(PlanError, match="nothing is known of its dense graph"):
        _ = again.scoring.graph
    if example:
        run(task, again, tmp_path / "resumed", seed=1, ckpt=path)
        assert all(torch.equal(value, whole.state_dict()[name]) for name, value in task.state_dict().items())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_masked_checkpoint_is_evaluated_without_an_example_and_fitted_further(tmp_path: Path) -> None:
    """There is no training step to take one from; what is masked is held again as soon as there is."""
    run(Task(), first := prune(reconstruct="after"), tmp_path)

    class Calling(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

    task, again = Calling(), prune(reconstruct="after")
    task.example_input_array = None
    data = loader(8, shuffle=False)
    trainer(again).validate(task, data, ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False)
    assert again.masking.plan == first.masking.plan
    assert again.masking.handle is None

    lp.load(tmp_path / "epoch=1.ckpt", alone := Task())
    zero = {name: value == 0 for name, value in alone.named_parameters()}
    held = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *of: Any) -> None:
            held.append(all((value[zero[name]] == 0).all() for name, value in module.named_parameters()))

    trainer(again, Look()).fit(task, loader(), data)
    assert held == [True] * 8
    assert params(task) < params(alone)
    assert again.reconstruction.lossless.passed


class Attending(Task):
    """Sizes in the code of its attention, and heads that torch's own class cannot make narrower."""

    def __init__(self) -> None:
        super().__init__()
        encoder = torch.nn.TransformerEncoderLayer(16, 2, 8, batch_first=True, norm_first=True, dropout=0.0)
        self.net = Tokens(Fused())
        self.net.blocks.append(encoder)
        randomise_(self.net).double().train()


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_replaced_code_and_narrow_heads_resume_and_go_back_to_the_dense_model(tmp_path: Path) -> None:
    def each_layer() -> PruneCallback:
        return PruneCallback(JRE(), selection=LayerRatio(0.5), reconstruct="before", start=2)

    whole = Attending()
    start = state(whole)
    runner = run(whole, each_layer(), tmp_path / "whole")
    assert whole.net.blocks[0].attention.sizes_in_code
    assert params(whole) < params(Attending())
    resumed = Attending()
    resumed.load_state_dict(start)
    run(
        resumed,
        prune(reconstruct="before", start=2),
        tmp_path / "resumed",
        seed=1,
        ckpt=tmp_path / "whole/epoch=3.ckpt",
    )
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())
    expected = runner.callback_metrics["val_loss"]
    runner.validate(whole, loader(8, shuffle=False), ckpt_path=tmp_path / "whole/epoch=0.ckpt", verbose=False)
    assert (params(whole), type(whole.net.blocks[0].attention)) == (params(Attending()), Fused)
    (found,) = runner.validate(
        whole, loader(8, shuffle=False), ckpt_path=tmp_path / "whole/epoch=4.ckpt", verbose=False
    )
    assert found["val_loss"] == expected


class Loadable(PrunedCheckpoints, Task):
    """With the mixin."""


def test_load_from_checkpoint_builds_the_small_model(tmp_path: Path) -> None:
    task = Loadable()
    run(task, prune(reconstruct="before"), tmp_path)
    again = Loadable.load_from_checkpoint(tmp_path / "last.ckpt")
    assert params(again) == params(task) < params(Task())
    assert torch.equal(again.eval()(images(2)), task.eval()(images(2)))
    again.train()
    fit(again, epochs=1)


def test_a_pruned_checkpoint_says_which_shapes_do_not_fit(tmp_path: Path) -> None:
    task = Task()
    run(task, prune(reconstruct="before"), tmp_path)
    wide = Task()
    wide.net.head.fc = torch.nn.Linear(wide.net.head.fc.in_features, 9).double()
    before = state(wide)
    with pytest.raises(CheckpointError, match=re.escape("is [5, 4] in the file (cut from [5, 12]) and [9, 12] in")):
        lp.load(tmp_path / "last.ckpt", wide)
    with pytest.raises(CheckpointError, match=re.escape("(cut from [5, 12]) and [9, 12] in the dense model")):
        run(wide, prune(reconstruct="before"), tmp_path, ckpt=tmp_path / "last.ckpt")
    other = Task(name="Vgg")
    with pytest.raises(CheckpointError, match=r"belongs to another model: \d+ missing"):
        lp.load(tmp_path / "last.ckpt", other)
    assert all(torch.equal(value, before[name]) for name, value in wide.state_dict().items())


def test_other_settings_than_the_first_runs_are_refused(tmp_path: Path) -> None:
    task = Task()
    with pytest.raises(Stop):
        run(task, prune(schedule=Gradual(3)), tmp_path, Interrupt(1))
    with pytest.raises(PlanError, match="was written with 3 steps, and"):
        run(Task(), prune(schedule=Gradual(4)), tmp_path, ckpt=tmp_path / "last.ckpt")


def test_checkpoints_hold_tensors_and_plain_data_only(tmp_path: Path) -> None:
    run(Task(), prune(reconstruct="before"), tmp_path)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert content["lightning_prune"]["format"] == "lightning-prune/1"
    assert any(key.startswith("PruneCallback") for key in content["callbacks"])


def test_fit_goes_on_when_called_twice() -> None:
    task, callback = Task(), prune(reconstruct="before")
    runner = fit(task, callback, epochs=2)
    size, plan = params(task), callback.masking.plan
    runner.fit_loop.max_epochs = 4
    runner.fit(task, loader(), loader(8, shuffle=False))
    assert (params(task), callback.masking.plan) == (size, plan)
    assert [record.epoch for record in callback.reconstruction.records] == [0, 1, 2, 3]
    with pytest.raises(CallbackError, match="was used on another module"):
        trainer(callback).fit(Task(), loader(), loader(8))


@pytest.mark.parametrize("kind", ["before", "never", "ramp, each"])
def test_going_back_to_a_checkpoint_in_the_same_process(kind: str, tmp_path: Path) -> None:
    task, callback = Task("adamw"), prune(**RUNS[kind])
    runner = run(task, callback, tmp_path)
    end, plan = state(task), callback.masking.plan
    for epoch in (3, 1):
        runner.fit(task, loader(), loader(8, shuffle=False), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert callback.masking.plan == plan
        assert all(torch.equal(value, end[name]) for name, value in task.state_dict().items())


def test_a_budget_in_steps_is_resumed(tmp_path: Path) -> None:
    def budget() -> PruneCallback:
        selection = lp.Budget(flops=0.5)
        return PruneCallback("l1", selection=selection, schedule=Gradual(3), reconstruct="during")

    whole, broken, resumed = (Task() for _ in range(3))
    for task in (broken, resumed):
        task.load_state_dict(whole.state_dict())
    run(whole, budget(), tmp_path / "whole")
    with pytest.raises(Stop):
        run(broken, budget(), tmp_path / "broken", Interrupt(1))
    run(resumed, budget(), tmp_path / "broken", ckpt=tmp_path / "broken" / "last.ckpt")
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())


def test_a_dense_checkpoint_is_loaded_and_then_pruned(tmp_path: Path) -> None:
    dense = Task()
    runner = trainer(epochs=2)
    runner.fit(dense, loader(), loader(8, shuffle=False))
    runner.save_checkpoint(tmp_path / "dense.ckpt")
    task, callback = Task(), prune(reconstruct="before")
    trainer(callback, epochs=4).fit(task, loader(), loader(8, shuffle=False), ckpt_path=tmp_path / "dense.ckpt")
    assert params(task) < params(dense)
    assert [record.epoch for record in callback.reconstruction.records] == [2, 3]
    assert callback.reconstruction.lossless.passed


class Rms(nn.Module):
    """An RMS norm over maps, whose eps and weight make up for the channels that go."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.eps, self.weight = 1e-3, nn.Parameter(torch.ones(channels, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + self.eps) * self.weight.view(1, -1, 1, 1)


def rms_task() -> Task:
    task = Task("adamw")
    layers = nn.Conv2d(3, 8, 3), Rms(8), nn.ReLU(), nn.Conv2d(8, 6, 3), Rms(6), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    torch.manual_seed(5)
    task.net = nn.Sequential(*layers, nn.Linear(6, 5)).double()
    return task


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("kind", ["ramp, each", "ramp, after", "before"])
def test_a_run_whose_norms_are_rescaled_goes_on_bit_for_bit(kind: str, tmp_path: Path) -> None:
    whole = rms_task()
    runner = run(whole, prune(**RUNS[kind]), tmp_path / "whole")
    broken = rms_task()
    with pytest.raises(Stop):
        run(broken, prune(**RUNS[kind]), tmp_path / "broken", Interrupt(3))
    resumed = rms_task()
    run(resumed, prune(**RUNS[kind]), tmp_path / "broken", ckpt=tmp_path / "broken" / "last.ckpt")
    assert resumed.net[1].eps == whole.net[1].eps == pytest.approx(1e-3 * 8 / whole.net[0].out_channels, rel=1e-12)
    assert whole.net[0].out_channels < 8
    assert all(torch.equal(value, state(whole)[name]) for name, value in state(resumed).items())
    for epoch in (0, 4):  # and back
        runner.validate(whole, loader(8, shuffle=False), ckpt_path=tmp_path / "whole" / f"epoch={epoch}.ckpt")
        assert whole.net[1].eps == pytest.approx(1e-3 * 8 / whole.net[0].out_channels, rel=1e-12)
