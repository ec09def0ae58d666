"""`lightning-prune latency-table`: a table of a model, or the kit that makes one elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_prune.cli import main
from lightning_prune.measure import LatencyTable
from tests.cli.tiny import MODEL, NET, files, refused

pytestmark = pytest.mark.usefixtures("workplace")
TABLE = ["latency-table", f"{NET}", "--arg", "width=8", "--input", "1", "3", "8", "8"]


@pytest.mark.parametrize("columns", ["60", "80", "160"])
def test_a_table_is_made_and_shown(capsys, monkeypatch, columns) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert main([*TABLE, "--engine", "eager", "--threads", "1", "--coarse", "--out", "made.json"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= int(columns)
    assert "3x3 conv at 8x8 relu" in " ".join(out.split()) or columns == "60"
    assert "made.json: 3 kinds of layers, " in " ".join(out.split())
    table = LatencyTable.load("made.json")
    assert (table.engine, table.threads) == ("eager", 1)
    assert [times.largest for times in table.layers.values()] == [(3, 8), (8, 8), (8, 3)]


def test_a_kit_is_written_instead(capsys) -> None:
    assert main([*TABLE, "--kit", "kit", "--threads", "4"]) == 0
    assert "python profile.py" in capsys.readouterr().out
    assert {path.name for path in Path("kit").iterdir()} == {
        "profile.py",
        "portable",
        "manifest.json",
        "model.onnx",
        "inputs.npz",
    }
    assert "table.json" not in files()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["latency-table", "no.such.Net"], "No module named 'no'"),
        ([*TABLE, "--engine", "onnx"], "invalid choice: 'onnx'"),
        ([*TABLE, "--threads", "0"], "at least 1, got '0'"),
        ([*TABLE, "--out", "."], "is a folder; name a file in it"),
        (["latency-table", "dense.pt", *MODEL, "--out", "task.yaml/x.json"], "cannot write"),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(capsys, argv, said) -> None:
    assert said in refused(capsys, *argv)
