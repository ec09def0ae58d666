"""The whole job from one YAML file: numbers in the report are those of the models that were built."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_prune.checkpoint import load
from lightning_prune.cli import main
from lightning_prune.criteria import JRE
from lightning_prune.data import DigitsDataModule
from lightning_prune.experiment import compare_orders
from lightning_prune.measurement import count_params
from lightning_prune.report import DENSE, FINE_TUNED, MASKED, RECONSTRUCTED
from lightning_prune.tasks import ClassificationTask
from tests.zoo import Residual


def net() -> nn.Module:
    """The zoo's residual net with ten classes."""
    torch.manual_seed(0)
    model = Residual()
    model.head.fc = nn.Linear(12, 10)
    return model


def random_net() -> nn.Module:
    """The same with weights that depend on the seed."""
    model = Residual()
    model.head.fc = nn.Linear(12, 10)
    return model


def task() -> ClassificationTask:
    return ClassificationTask(
        net(), 10, optimizer=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), input_size=(3, 16, 16)
    )


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("experiment")
    data = DigitsDataModule(batch_size=128, size=16)
    report = compare_orders(
        task(), data, JRE(), dense_epochs=2, finetune_epochs=2, finetune_lr=0.05, latency_repeats=4,
        output=str(folder), progress=False,
    )  # fmt: skip
    return report, folder, data


def test_stages_are_the_three_states_and_both_orders(outcome) -> None:
    report, _, _ = outcome
    assert [stage.name for stage in report.stages] == [DENSE, MASKED, RECONSTRUCTED, *FINE_TUNED.values()]
    dense, masked, small, first, second = report.stages
    assert dense.params == masked.params == count_params(net())
    assert small.params == first.params == second.params < 0.6 * dense.params
    assert small.flops["paper"] < 0.7 * dense.flops["paper"]
    assert small.size_bytes < dense.size_bytes
    assert all(stage.latency_ms > 0 for stage in report.stages)


def test_masked_and_reconstructed_agree_to_the_last_image(outcome) -> None:
    report, _, _ = outcome
    lossless = report.losslessness
    assert lossless.dtype == "float64"
    assert lossless.max_rel_error <= 1e-10
    assert (lossless.changed, lossless.total) == (0, 360)
    assert report.stage(MASKED).accuracy == report.stage(RECONSTRUCTED).accuracy


def test_both_orders_are_timed_epoch_by_epoch(outcome) -> None:
    report, _, _ = outcome
    for order in "AB":
        epochs = report.timing(order).epochs
        assert [record.epoch for record in epochs] == [0, 1]
        assert all(record.train_seconds > 0 for record in epochs)
        assert epochs[0].elapsed_seconds < epochs[1].elapsed_seconds
    a, b = (report.timing(order).epochs[-1].accuracy for order in "AB")
    assert a == pytest.approx(b, abs=0.02)  # the same computation up to rounding


def test_the_pruned_checkpoint_is_the_model_of_order_b(outcome) -> None:
    report, folder, data = outcome
    fresh = task()
    plan = load(folder / "pruned.pt", fresh)
    assert count_params(fresh) == report.stage(FINE_TUNED["B"]).params
    assert plan.coupling == "joint"
    fresh.eval()
    right = sum(int((fresh(x).argmax(1) == y).sum()) for x, y in data.test_dataloader())
    assert right / 360 == pytest.approx(report.stage(FINE_TUNED["B"]).accuracy, abs=1e-6)


def test_channels_of_every_layer_are_reported_in_the_networks_order(outcome) -> None:
    report, _, _ = outcome
    assert [layer.layer for layer in report.layers] == [
        "stem.0", "a1.0", "a2.0", "b1.0", "b2.0", "down.0", "head.fc",
    ]  # fmt: skip
    by_name = {layer.layer: layer for layer in report.layers}
    assert by_name["stem.0"].kept == by_name["a2.0"].kept
    assert (by_name["head.fc"].dense, by_name["head.fc"].kept) == (10, 10)


CONFIG = """
title: tiny
dense_epochs: 1
finetune_epochs: 1
latency_repeats: 2
progress: false
output: out
criterion: {class_path: lightning_prune.L1}
task:
  class_path: lightning_prune.tasks.ClassificationTask
  init_args:
    model: {class_path: tests.test_experiment.net}
    num_classes: 10
    input_size: [3, 16, 16]
data:
  class_path: lightning_prune.data.DigitsDataModule
  init_args: {batch_size: 256, size: 16}
"""


def test_the_command_writes_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(CONFIG)
    assert main(["experiment", "--config", "tiny.yaml", "--ratio", "0.3"]) == 0
    out = capsys.readouterr().out
    assert "lossless: max relative error" in out
    assert "fine-tuned (order B)" in out
    written = {path.name for path in Path("out").iterdir()}
    assert {"report.html", "report.json", "pruned.pt", "channels.png", "accuracy_time.png"} <= written
    assert "GlobalRatio(ratio=0.3" in json.loads(Path("out/report.json").read_text())["settings"]["selection"]


def test_the_same_seed_gives_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(CONFIG.replace("tests.test_experiment.net", "tests.test_experiment.random_net"))
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(states))  # whatever ran before
        assert main(["experiment", "--config", "tiny.yaml", "--seed", str(seed)]) == 0
        states.append(torch.load("out/pruned.pt", weights_only=True)["state_dict"]["model.stem.0.weight"])
    assert torch.equal(states[0], states[1])
    assert states[0].shape != states[2].shape or not torch.equal(states[0], states[2])


def test_a_wrong_key_names_its_path_and_the_valid_ones(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(CONFIG + "finetune_epoch: 3\n")
    with pytest.raises(SystemExit) as stop:
        main(["experiment", "--config", "tiny.yaml"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "'finetune_epoch' is not accepted. Did you mean 'finetune_epochs'?" in error
