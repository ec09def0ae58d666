"""A model that is small already is fine-tuned, and its checkpoints find a dense module again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

import lightning_prune as lp
from lightning_prune.callbacks import SmallCheckpointCallback
from lightning_prune.errors import CallbackError, CheckpointError
from lightning_prune.reconstruction import ChannelMap
from tests.callbacks.helpers import Task, fit, loader, params, trainer
from tests.callbacks.test_refusals import refused


def small_task(folder: Path) -> tuple[Task, lp.Plan]:
    """As a new process has it, which knows the file alone."""
    task = Task()
    result = lp.prune(task, task.example_input_array, criterion="l1", ratio=0.5)
    lp.save(folder / "small.pt", result.model, result.plan)
    return task, lp.load(folder / "small.pt", task)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_checkpoints_of_fine_tuning_load_into_a_dense_module_and_resume(tmp_path: Path) -> None:
    task, plan = small_task(tmp_path)
    saving = ModelCheckpoint(tmp_path / "a", filename="{epoch}", save_top_k=-1, monitor="val_loss")
    fit(task, SmallCheckpointCallback(plan), saving, lp.callbacks.RandomStateCallback(), enable_checkpointing=True)
    dense = Task()
    assert lp.load(tmp_path / "a" / "epoch=1.ckpt", dense) == plan
    assert params(dense) == params(task) < params(Task())
    assert all(torch.equal(value, task.state_dict()[name]) for name, value in dense.state_dict().items())
    assert ChannelMap.load(tmp_path / "a" / "epoch=1.ckpt") == ChannelMap.of(task)

    resumed, plan = small_task(tmp_path)
    again = trainer(SmallCheckpointCallback(plan), lp.callbacks.RandomStateCallback())
    torch.manual_seed(1)
    again.fit(resumed, loader(), loader(8, shuffle=False), ckpt_path=tmp_path / "a" / "epoch=0.ckpt")
    assert all(torch.equal(value, task.state_dict()[name]) for name, value in resumed.state_dict().items())


def test_a_network_that_was_pruned_alone_finds_its_dense_module(tmp_path: Path) -> None:
    task = Task()
    result = lp.prune(task.net, task.example_input_array, criterion="l1", ratio=0.5)
    task.net = result.model
    fit(task, SmallCheckpointCallback(result.plan)).save_checkpoint(tmp_path / "last.ckpt")
    dense = Task()
    assert lp.load(tmp_path / "last.ckpt", dense) == result.plan
    assert params(dense) < params(Task())
    assert all(torch.equal(value, task.state_dict()[name]) for name, value in dense.state_dict().items())


def test_without_it_no_dense_module_takes_the_shapes(tmp_path: Path) -> None:
    task, _ = small_task(tmp_path)
    fit(task).save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(CheckpointError, match="is not a pruned checkpoint"):
        lp.load(tmp_path / "plain.ckpt", Task())


@pytest.mark.parametrize("kind", ["pruned here", "small already"])
def test_checkpoints_of_weights_alone_have_the_shapes(kind: str, tmp_path: Path) -> None:
    """For them Lightning asks no callback."""
    task, plan = (Task(), None) if kind == "pruned here" else small_task(tmp_path)
    callback = lp.PruneCallback("l1", 0.5) if plan is None else SmallCheckpointCallback(plan)
    saving = ModelCheckpoint(tmp_path / "a", filename="best", monitor="val_loss", save_weights_only=True)
    fit(task, callback, saving, enable_checkpointing=True).save_checkpoint(tmp_path / "end.ckpt", weights_only=True)
    for name in ("a/best.ckpt", "end.ckpt"):
        dense = Task()
        assert lp.load(tmp_path / name, dense).groups
        assert params(dense) == params(task) < params(Task())
    assert all(torch.equal(value, task.state_dict()[name]) for name, value in dense.state_dict().items())
    (expected,) = trainer().validate(task, loader(8, shuffle=False), verbose=False)
    evaluating = trainer(lp.PruneCallback("l1", 0.5))
    (found,) = evaluating.validate(Task(), loader(8, shuffle=False), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    assert found == expected


def test_a_dense_module_and_one_that_is_pruned_here_are_refused(tmp_path: Path) -> None:
    task, plan = small_task(tmp_path)
    refused(Task(), SmallCheckpointCallback(plan), error=CallbackError, match="Task is dense: load the small model")
    both = SmallCheckpointCallback(plan), lp.PruneCallback("l1", 0.5)
    refused(task, *both, error=CallbackError, match="PruneCallback writes the plan itself")
