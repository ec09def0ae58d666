"""`lightning-prune sensitivity`: what it prints and writes, and that prune and fit take the ratios."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import lightning_prune as lp
from lightning_prune.cli import main
from lightning_prune.experiments.runner import Runner
from tests.cli.tiny import DescribedData, files, refused

pytestmark = pytest.mark.usefixtures("workplace")
ASKED = [
    "sensitivity",
    "dense.ckpt",
    "--config",
    "task.yaml",
    "--ratios",
    "0.25,0.5",
    "--metric",
    "loss",
    "--out",
    "out",
]


def normed_net() -> nn.Module:
    body = [nn.Conv2d(3, 8, 3), nn.GroupNorm(1, 8), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


@pytest.fixture(autouse=True)
def validated(trained) -> None:
    content = yaml.safe_load(Path("task.yaml").read_text())
    content["data"] = {"class_path": f"{DescribedData.__module__}.DescribedData"}
    Path("task.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


def written() -> set[str]:
    return {path.name for path in Path("out").iterdir() if not path.name.startswith("scores-")}


def test_curves_are_shown_kept_and_become_ratios(capsys, caplog, monkeypatch, trained) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*ASKED, "--batches", "2"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert max(map(len, out.splitlines())) <= 80
    rows = {row[0]: row[1:] for line in out.splitlines() if len(row := line.split()) == 4}
    assert {name: row[0] for name, row in rows.items()} == {"model.0": "16", "model.3": "16"}
    dense = Runner(DescribedData()).validated(trained, 2)["loss"]
    assert f"of loss lost ({dense:.4g} dense)" in out
    assert "on the first 2 validation batches, channels by L1" in out
    assert written() == {"sensitivity.jsonl", "sensitivity.csv", "sensitivity.png"}

    monkeypatch.setattr("lightning_prune.sensitivity.measuring.evaluated", None)  # nothing is measured anew
    assert main([*ASKED, "--batches", "2", "--drop", "100"]) == 0
    assert "chosen: no layer alone loses more than 100 of loss; together they lose more" in capsys.readouterr().out
    assert written() >= {"layer_ratios.json", "prune.yaml"}
    content = json.loads(Path("out/layer_ratios.json").read_text())
    assert content["overrides"] == {"model.0": 0.5, "model.3": 0.5}

    content["overrides"]["model.3"] = 0.25
    Path("mine.json").write_text(json.dumps(content))
    assert main(["prune", "dense.ckpt", "--config", "task.yaml", "--layer-ratios", "mine.json"]) == 0
    assert "channels removed by l1, --layer-ratios mine.json, coupling joint" in " ".join(
        capsys.readouterr().out.split()
    )
    plan = lp.Plan.from_dict(torch.load("pruned.pt", weights_only=True)["plan"])
    assert [len(group.removed) for group in plan.groups.values()] == [8, 4]

    silent = ["--trainer.log_every_n_steps", "1", "--trainer.enable_progress_bar", "false"]
    silent += ["--trainer.enable_model_summary", "false"]
    assert (
        main(["fit", "--config", "task.yaml", "--config", "out/prune.yaml", "--trainer.max_epochs", "1", *silent]) == 0
    )
    assert "Masked 16 of 32 channels" in caplog.text


def test_every_group_keeps_so_many_channels(capsys) -> None:
    assert main([*ASKED, "--batches", "1", "--drop", "100", "--min-channels", "12", "--round-to", "2"]) == 0
    out = capsys.readouterr().out
    lost = re.findall(r"^model.\d +16 +(\S+) +(\S+) ", out, re.MULTILINE)
    assert [quarter == half for quarter, half in lost] == [True, True]  # both mask 4 channels
    (command,) = [line for line in out.splitlines() if line.startswith("lightning-prune prune ")]
    assert command.endswith(" --layer-ratios out/layer_ratios.json --round-to 2 --min-channels 12")
    assert main(command.split()[1:]) == 0
    plan = lp.Plan.from_dict(torch.load("pruned.pt", weights_only=True)["plan"])
    assert [len(group.keep) for group in plan.groups.values()] == [12, 12]


def test_a_budget_says_what_remains(capsys) -> None:
    assert main([*ASKED, "--batches", "1", "--budget", "flops=0.6"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "chosen: no layer alone loses more than" in said
    share = float(said.partition("(together they lose more); ")[2].partition(" %")[0])
    assert 0 < share <= 60


def test_what_cannot_be_measured_is_refused_in_one_line(capsys) -> None:
    assert "logs no 'val_err'; it logs val_loss" in refused(capsys, *ASKED, "--metric", "err")
    assert "for latency_ms= see lightning-prune prune" in refused(capsys, *ASKED, "--budget", "latency_ms=3")
    assert "a share from 0 to below 1, such as 0.5, got '2'" in refused(capsys, *ASKED, "--ratios", "2")
    assert "Did you mean 'taylor'?" in refused(capsys, *ASKED, "--criterion", "tailor")
    argv = ["prune", "dense.ckpt", "--config", "task.yaml", "--layer-ratios", "task.yaml"]
    assert "task.yaml is no file of layer ratios" in refused(capsys, *argv)
    assert "leave out --per-layer" in refused(capsys, *argv, "--per-layer")
    content = yaml.safe_load(Path("task.yaml").read_text())
    content["data"]["class_path"] = content["data"]["class_path"].replace("DescribedData", "TinyData")
    Path("task.yaml").write_text(yaml.safe_dump(content))
    assert "validate nothing together" in refused(capsys, *ASKED)
    assert "task.yaml" in files()


def test_the_command_that_follows_names_all_that_was_asked(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    asked = ["--batches", "1", "--drop", "100", "--out", "my out", "--model.label_smoothing", "0.1", "--statistics"]
    assert main([*ASKED, *asked, "--criterion", "random"]) == 0
    out = capsys.readouterr().out
    (command,) = [line for line in out.splitlines() if line.startswith("lightning-prune prune ")]
    assert command == (
        "lightning-prune prune dense.ckpt --config task.yaml --model.label_smoothing 0.1 --criterion random "
        "--layer-ratios 'my out/layer_ratios.json' --statistics"
    )
    assert main(shlex.split(command)[1:]) == 0
    assert "--statistics" not in capsys.readouterr().out  # no statistics are in the way, and nothing is lost
    (callback,) = yaml.safe_load(Path("my out/prune.yaml").read_text())["trainer"]["callbacks+"]
    assert callback["init_args"]["statistics"] is True


def test_channels_under_a_statistic_are_masked_where_it_is_asked_for(capsys) -> None:
    content = yaml.safe_load(Path("task.yaml").read_text())
    content["model"]["init_args"]["model"] = {"class_path": f"{__name__}.normed_net"}
    Path("task.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    torch.save({f"model.{name}": value for name, value in normed_net().state_dict().items()}, "dense.ckpt")
    asked = [*ASKED, "--batches", "1"]
    assert "model.0 enters a statistic over channels" in refused(capsys, *asked)
    assert main([*asked, "--statistics", "--out", "lossy"]) == 0
    assert re.search(r"^model\.0 +8 ", capsys.readouterr().out, re.MULTILINE)
