"""No command writes over what an earlier one has written, unless it is asked to."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_prune.cli import main
from lightning_prune.cli.options import PARSERS
from lightning_prune.cli.run_folder import new_folder
from tests.cli.tiny import MODEL, NET, refused

#: By command: what is written, as the last word.
WRITERS = {
    "prune": ["dense.pt", *MODEL, "--out", "old.pt"],
    "export": ["dense.pt", *MODEL, "--out", "old.onnx"],
    "quantize": ["dense.pt", "--config", "task.yaml", "--out", "old.onnx"],
    "latency-table": [NET, "--out", "old.json"],
    "graph": [NET, "--out", "old.html"],
    "channels": ["pruned.pt", "--out", "old.json"],
}
IN_FOLDERS = {"measure", "sensitivity", "compare", "reproduce"}  # write nothing, or add to what is there


def test_every_command_is_here() -> None:
    assert PARSERS.keys() == WRITERS.keys() | IN_FOLDERS


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("command", WRITERS)
def test_an_earlier_file_stays(capsys, command: str) -> None:
    old = Path(WRITERS[command][-1])
    old.write_text("hours of work", encoding="utf-8")
    asked = [command, *WRITERS[command]]
    assert f"{old} is there already; name another with --out, or add --overwrite" in refused(capsys, *asked)
    assert old.read_text("utf-8") == "hours of work"
    assert PARSERS[command]([*asked[1:], "--overwrite"]).out == old


@pytest.mark.usefixtures("workplace")
def test_what_is_read_stays_even_when_asked(capsys) -> None:
    for asked in (["prune", "dense.pt", *MODEL], ["latency-table", "dense.pt", *MODEL], ["channels", "dense.pt"]):
        assert "--out dense.pt is what is read" in refused(capsys, *asked, "--out", "dense.pt", "--overwrite")


@pytest.mark.usefixtures("workplace")
def test_the_kit_goes_into_a_new_folder_and_nothing_is_explained_away(capsys) -> None:
    Path("kit").mkdir()
    (Path("kit") / "notes.txt").touch()
    kit = ["latency-table", "dense.pt", *MODEL, "--kit", "kit"]
    assert "kit is there already; name another with --kit" in refused(capsys, *kit)
    Path("pruned.pt").touch()
    assert main(["prune", "dense.pt", *MODEL, "--explain"]) == 0  # writes nothing


def test_a_study_chooses_a_new_folder(tmp_path) -> None:
    first = tmp_path / "study"
    assert new_folder(first) == first
    first.mkdir()
    assert new_folder(first) == first  # nothing is in it
    (first / "dense.pt").touch()
    assert new_folder(first) == tmp_path / "study-2"
    (tmp_path / "study-2").mkdir()
    (tmp_path / "study-2" / "dense.pt").touch()
    assert new_folder(str(first)) == tmp_path / "study-3"
