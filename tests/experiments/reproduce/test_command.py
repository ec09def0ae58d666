"""`lightning-prune reproduce`: lists, runs, resumes, refuses; every shipped recipe at its smallest scale if asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest
import yaml

from lightning_prune.cli import main
from lightning_prune.cli.options import PRECISIONS
from lightning_prune.cli.options import SCALES as CLI_SCALES
from lightning_prune.experiments.reproduce import SCALES, recipe_names
from lightning_prune.experiments.runner import Precision
from tests.experiments.reproduce.tiny import CONTENT

ROOT = Path(__file__).parents[3]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONTENT, sort_keys=False), encoding="utf-8")
    return path


def test_choices_are_those_of_the_library() -> None:
    assert CLI_SCALES == SCALES
    assert get_args(Precision) == PRECISIONS


def test_it_lists_what_can_be_reproduced(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["reproduce"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for name in recipe_names():
        assert name in out


def test_it_runs_a_recipe_and_finds_it_again(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["reproduce", str(tiny), "--out", str(tmp_path / "out"), "--seeds", "0", "--only", "L1"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "net L1 .5, seed 0: left" in out
    assert "Ours beside the published" in out
    assert (tmp_path / "out" / "page.md").is_file()
    assert (tmp_path / "out" / "page.html").is_file()
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").iterdir()}
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "cells").iterdir()} == stamps


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["lr-tabel2"], 2, "Did you mean 'lr-table2'"),
        (["lr-table4", "--scale", "hour", "--only", "nonsense", "--data", "x"], 1, "no row of lr-table4 fits nonsense"),
        (["lr-table2", "--scale", "hour"], 1, "say with --data where cifar10 lies"),
        (["lr-table2", "--scale", "hour", "--data", "nowhere"], 1, "nowhere"),
    ],
)
def test_it_refuses(words, status, says, tmp_path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", *words]) == status
    assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_process_that_is_killed_loses_nothing_that_was_done(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "lightning_prune.cli", "reproduce", str(tiny), "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    options = {"cwd": tmp_path, "env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **options)
    try:
        until = time.monotonic() + 120
        while not (found := list(out.glob("cells/net-seed0-*.json"))) and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (first,) = found
    stamp = first.stat().st_mtime_ns
    weights = {path: path.stat().st_mtime_ns for path in out.glob("dense-*.ckpt")}
    assert len(weights) == 1
    assert main(["reproduce", str(tiny), "--out", str(out)]) == 0
    assert first.stat().st_mtime_ns == stamp
    assert {path: path.stat().st_mtime_ns for path in out.glob("dense-*.ckpt")} == weights
    assert len(list(out.glob("cells/net-*.json"))) == 3


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_runs_at_its_smallest_scale(name: str, tmp_path: Path) -> None:
    assert main(["reproduce", name, "--out", str(tmp_path)]) == 0
    assert not (tmp_path / "errors").exists()
    assert "## Not computed" not in (tmp_path / "page.md").read_text(encoding="utf-8")
