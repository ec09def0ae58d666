"""Plans that were made before, carried out in a Trainer, and the map of channels in its checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lightning_prune as lp
from lightning_prune.callbacks import PruneCallback
from lightning_prune.errors import CheckpointError, PlanError
from lightning_prune.plan import Plan
from lightning_prune.reconstruction import ChannelMap
from tests.callbacks.helpers import Task, fit, loader, trainer
from tests.helpers import random_plan

# What a network of `helpers.Task` is called inside it
LAYER = "net.b1.0"


def changed() -> Plan:
    task = Task()
    return random_plan(lp.trace(task, task.example_input_array)).keep(LAYER, [0]).remove(LAYER, [1])


@pytest.mark.parametrize("reconstruct", ["before", "after"])
def test_a_plan_takes_the_place_of_a_selection(reconstruct, tmp_path: Path) -> None:
    plan = changed()
    plan.save(tmp_path / "plan.json")
    prune = PruneCallback("l1", selection=lp.selection.FixedPlan(plan=tmp_path / "plan.json"), reconstruct=reconstruct)
    task = Task()
    runner = fit(task, prune)
    assert prune.masking.plan == plan
    assert prune.reconstruction.lossless.passed
    channels = ChannelMap.of(task)
    inside = ChannelMap.of(task.net)  # a part of what was cut knows it, too
    assert {f"net.{name}": layer for name, layer in inside.layers.items()} == channels.layers
    assert channels.layers[LAYER].outputs.keep == plan.groups[LAYER].keep
    runner.save_checkpoint(tmp_path / "last.ckpt")
    assert ChannelMap.load(tmp_path / "last.ckpt") == channels

    again, other = Task(), PruneCallback("l1", selection=plan, reconstruct=reconstruct)
    trainer(other, epochs=3).fit(again, loader(), loader(8, shuffle=False), ckpt_path=tmp_path / "last.ckpt")
    assert other.masking.plan == plan
    assert ChannelMap.of(again) == channels


def test_a_masked_checkpoint_has_no_new_numbers(tmp_path: Path) -> None:
    runner = fit(Task(), PruneCallback("l1", selection=changed(), reconstruct="never"))
    runner.save_checkpoint(tmp_path / "masked.ckpt")
    with pytest.raises(CheckpointError, match=r"masked\.ckpt is not a pruned checkpoint"):
        ChannelMap.load(tmp_path / "masked.ckpt")


def test_a_small_module_that_becomes_dense_again_has_its_old_numbers(tmp_path: Path) -> None:
    class SaveDense(lp.callbacks.PruneCallback):
        def on_fit_start(self, runner, task) -> None:
            runner.save_checkpoint(tmp_path / "dense.ckpt")
            super().on_fit_start(runner, task)

    task = Task()
    runner = fit(task, SaveDense("l1", selection=changed(), reconstruct="before"))
    assert ChannelMap.of(task).tensors
    runner.validate(task, loader(8, shuffle=False), ckpt_path=tmp_path / "dense.ckpt", verbose=False)
    assert not ChannelMap.of(task).tensors
    assert task.net.b1[0].out_channels == 12


def test_a_plan_of_another_coupling_is_refused_before_a_weight_is_touched() -> None:
    task = Task()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    with pytest.raises(PlanError, match="the plan was made with coupling='joint', and it is asked for with"):
        fit(task, PruneCallback("l1", selection=changed(), coupling="union"), epochs=1)
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())
