"""The scripts of examples/ do what they say, as their users start them, on the small data that they make up."""

from __future__ import annotations

import csv
import os
import runpy
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
import torchvision

import lightning_prune as lp

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on steps and workers


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def start(name: str, *words: str) -> None:
        monkeypatch.setattr(sys, "argv", [name, *words])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")

    return start


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_a_script_is_short(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= 80


def test_deployer_gets_a_smaller_checked_file_and_a_report(run, capsys) -> None:
    torch.save(torchvision.models.resnet18(num_classes=10).state_dict(), "best.pt")
    run("deployer.py", "--weights", "best.pt", "--out", "out")
    small = torchvision.models.resnet18(num_classes=10)
    dense = sum(parameter.numel() for parameter in small.parameters())
    lp.load("out/pruned.pt", small)
    assert 0.38 * dense < sum(parameter.numel() for parameter in small.parameters()) <= 0.4 * dense
    images = torch.randn(2, 3, 64, 64)
    session = onnxruntime.InferenceSession("out/pruned.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), small.eval()(images), rtol=1e-4, atol=1e-4)
    printed = capsys.readouterr().out
    assert "lossless: max relative error" in printed
    assert max(map(len, printed.splitlines())) <= 80
    assert "old→new" in Path("out/report.html").read_text("utf-8")
    assert "<svg" in Path("out/graph.html").read_text("utf-8")


def test_researcher_compares_with_seeds_and_an_own_criterion(run, capsys) -> None:
    run("researcher.py", "--out", "out")
    with Path("out/comparison.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert {row["criterion"] for row in rows} == {"l1", "taylor", "largest weight"}
    assert {row["seed"] for row in rows} == {"0", "1"}
    assert Path("out/comparison.png").stat().st_size > 10_000
    assert "largest weight" in capsys.readouterr().out


@pytest.mark.slow
def test_researcher_reproduces_a_table_in_small(run, capsys) -> None:
    run("researcher.py", "--out", "out", "--table", "guo-lenet")
    assert Path("out/guo-lenet/report.html").exists()


def test_team_trains_from_yaml_and_resumes(run) -> None:
    config = str(EXAMPLES / "team.yaml")
    run("team.py", "fit", "--config", config, "--trainer.max_epochs", "1")
    width = torch.load("runs/team/last.ckpt", weights_only=True)["state_dict"]["net.1.body.0.weight"].shape[0]
    assert width < 16
    run("team.py", "fit", "--config", config, "--ckpt_path", "runs/team/last.ckpt", "--trainer.max_epochs", "2")
    again = torch.load("runs/team/last.ckpt", weights_only=True)
    assert (again["global_step"], again["state_dict"]["net.1.body.0.weight"].shape[0]) == (46, width)
    with Path("runs/team/metrics.csv").open() as stream:
        assert any(row["accuracy"] for row in csv.DictReader(stream))


@pytest.mark.slow
def test_team_trains_in_two_processes_logs_to_wandb_and_resumes(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "team.py"), "fit", "--config", str(EXAMPLES / "team.yaml")]
    command += ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    paths = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "WANDB_MODE": "offline"}
    wandb = ["--trainer.logger", "WandbLogger", "--trainer.logger.save_dir", "runs/team"]
    resume = ["--ckpt_path", "runs/team/last.ckpt", "--trainer.max_epochs", "3"]
    for more in ([], [*resume, *wandb]):
        done = subprocess.run([*command, *more], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    assert torch.load(tmp_path / "runs/team/last.ckpt", weights_only=True)["global_step"] == 36
    assert list(tmp_path.glob("runs/team/wandb/offline-run-*"))
