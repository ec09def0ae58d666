"""Every command that reads a file refuses every kind of bad one: one message, no traceback, nothing run or written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from lightning_prune.cli import COMMANDS, main
from tests.cli.tiny import MODEL, files

TASK = ["--config", "task.yaml"]
#: By command: command lines with BAD where a file of weights stands, or bad.yaml, bad.json for the other kinds.
READERS = {
    "fit": [["--config", "bad.yaml"], [*TASK, "--ckpt_path", "BAD"]],
    "validate": [["--config", "bad.yaml"], [*TASK, "--ckpt_path", "BAD"]],
    "test": [["--config", "bad.yaml"], [*TASK, "--ckpt_path", "BAD"]],
    "prune": [
        ["BAD", *MODEL],
        ["dense.pt", "--config", "bad.yaml"],
        ["dense.pt", *MODEL, "--budget", "latency_ms=1", "--latency-table", "bad.json"],
        ["dense.pt", *MODEL, "--plan", "bad.json"],
        ["dense.pt", *MODEL, "--layer-ratios", "bad.json"],
    ],
    "channels": [["BAD"]],
    "sensitivity": [["BAD", *TASK], ["dense.pt", "--config", "bad.yaml"]],
    "measure": [["BAD", *MODEL], ["dense.pt", "BAD", *MODEL], ["dense.pt", "--config", "bad.yaml"]],
    "latency-table": [["BAD", *MODEL], ["dense.pt", "--config", "bad.yaml"]],
    "export": [["BAD", *MODEL, "--out", "net.onnx"], ["dense.pt", "--config", "bad.yaml", "--out", "net.onnx"]],
    "quantize": [["BAD", *TASK, "--out", "q.onnx"], ["dense.pt", "BAD", *TASK, "--out", "q.onnx"]],
    "graph": [["--config", "bad.yaml"]],
    "experiment": [["--config", "bad.yaml"]],
    "compare": [["--config", "bad.yaml"], [*TASK, "--checkpoint", "BAD"]],
    "reproduce": [["bad.yaml"]],
    "demo": [["--config", "bad.yaml"]],
    "recipes": [],  # reads none
}


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trap",)


CONTENT = {"empty": b"", "a text": b"no such thing", "nested": b"[" * 200_000, "bytes": b"\xff\x00\xfe" * 9}


def bad(kind: str, name: str) -> None:
    path = Path(name)
    if kind == "missing":
        return
    if kind == "a folder":
        path.mkdir()
    elif kind == "code":
        torch.save({"state_dict": {"0.weight": torch.ones(1)}, "hyper_parameters": Trap()}, path)
    elif kind == "cut short":
        path.write_bytes(Path("dense.pt").read_bytes()[:700])
    else:
        path.write_bytes(CONTENT[kind])


KINDS = ["missing", "empty", "a text", "cut short", "code", "a folder", "nested", "bytes"]
LINES = [(command, number) for command, lines in READERS.items() for number in range(len(lines))]


def test_every_command_is_here() -> None:
    assert READERS.keys() == COMMANDS.keys()


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize(("command", "number"), LINES, ids=[f"{command}-{number}" for command, number in LINES])
def test_bad_files_are_refused_by_one_message(capsys, command: str, number: int) -> None:
    words = READERS[command][number]
    name = next(word for word in words if word.lower().startswith("bad"))
    for kind in KINDS:
        bad(kind, name)
        before = files()
        capsys.readouterr()
        try:
            status = main([command, *words])
        except SystemExit as stop:
            status = stop.code
        err = capsys.readouterr().err
        (said,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert status in (1, 2), kind
        assert name in said, kind
        assert "weights_only" not in err, kind
        assert "Traceback" not in err, kind
        assert files() == before, kind  # nothing written, no trap
        path = Path(name)
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)


def test_torch_json_and_yaml_files_are_read_in_one_place() -> None:
    root = Path(__file__).parents[2] / "lightning_prune"
    own = {"files.py", "tensor_files.py"}
    readers = ("torch.load(", "yaml.safe_load(", "json.loads(Path", "json.load(", "pickle.load")
    found = set()
    for path in root.rglob("*.py"):
        code = [
            line
            for line in path.read_text("utf-8").splitlines()
            if not any(mark in line for mark in (">>>", "...", "`", "torch.save(torch.load("))
        ]
        if any(reader in line for reader in readers for line in code):
            found.add(path.relative_to(root).as_posix())
    assert found - own == {"data/yolo_files.py"}  # which names the place in it, and knows nothing of pruning
