"""A budget of latency inside fit, by a table: met, and resumed without being measured again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

import lightning_prune as lp
from lightning_prune.callbacks import PruneCallback
from lightning_prune.schedule import Gradual
from tests.callbacks.helpers import Task, loader, trainer
from tests.selection.tables import Simulated, Steps
from tests.zoo import images


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_latency_is_met_by_a_table_inside_fit_and_resumed(monkeypatch, tmp_path: Path, when: str) -> None:
    table = Steps(lane=2)
    engine = Simulated(monkeypatch, table)
    task, x = Task(), images(2)
    budget = lp.Budget(latency_ms=0.6 * engine.milliseconds(task, x), engine=engine, table=table)
    callback = PruneCallback("l1", selection=budget, reconstruct=when)
    runner = trainer(callback, ModelCheckpoint(tmp_path, save_last=True), epochs=1, enable_checkpointing=True)
    runner.fit(task, loader(), loader(8, shuffle=False))
    assert 0.9 * budget.latency_ms < engine.milliseconds(task, x) <= budget.latency_ms
    assert callback.reconstruction.lossless.passed

    measured, again = engine.prepared, PruneCallback("l1", selection=budget, reconstruct=when)
    runner = trainer(again, ModelCheckpoint(tmp_path, save_last=True), epochs=2, enable_checkpointing=True)
    runner.fit(other := Task(), loader(), loader(8, shuffle=False), ckpt_path=tmp_path / "last.ckpt")
    assert engine.prepared == measured
    assert again.masking.plan == callback.masking.plan
    assert engine.milliseconds(other, x) == engine.milliseconds(task, x)


def test_a_latency_is_not_spread_over_steps(monkeypatch) -> None:
    table = Steps(lane=2)
    budget = lp.Budget(latency_ms=1.0, engine=Simulated(monkeypatch, table), table=table)
    task = Task()
    before = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    with pytest.raises(lp.PruningError, match="depends on the machine; use flops="):
        trainer(PruneCallback("l1", selection=budget, schedule=Gradual(2), reconstruct="during")).fit(
            task, loader(), loader(8)
        )
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.state_dict().items())
