"""The campaign in small: damaged files of every kind; a handful of kills; what its page says."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

import lightning_prune as lp
from benchmarks.reliability.corruption import CAMPAIGN, GOOD, Prepared
from benchmarks.reliability.damages import Damage, damages
from benchmarks.reliability.report import page
from benchmarks.reliability.specimens import SPECIMENS
from benchmarks.rows import Rows
from lightning_prune.errors import ExportError
from lightning_prune.export.loading import load_exported
from lightning_prune.export.metadata import read_metadata

pytestmark = pytest.mark.slow  # no part of the package

NATIVE = [specimen for specimen in SPECIMENS.values() if not specimen.forked]


@pytest.mark.filterwarnings("ignore")  # of libraries, about what they read
@pytest.mark.parametrize("specimen", NATIVE, ids=[specimen.name for specimen in NATIVE])
def test_a_damaged_file_is_read_right_or_refused_by_name_with_a_way_out(specimen, tmp_path: Path) -> None:
    prepared = Prepared(specimen, tmp_path / "file")
    assert specimen.read(prepared.path) == prepared.whole

    @settings(
        max_examples=12,
        database=None,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(damages())
    def read(damage: Damage) -> None:
        found = prepared.outcome(damage, [b"PK\x03\x04", b"{}", b"a: [1]\n", b"\xff\xd8\xff"])
        assert found.what in GOOD, found

    read()


@pytest.mark.filterwarnings("ignore")
def test_no_record_of_an_exported_program_is_executed(tmp_path: Path) -> None:
    path, canary = tmp_path / "net.pt2", tmp_path / "canary"
    lp.export(torch.nn.ReLU(), torch.rand(1, 3), path, format="torch_export")
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    (samples,) = [name for name in records if name.endswith("sample_inputs/model.pt")]

    class Trap:
        def __reduce__(self):
            return Path.touch, (canary,)

    torch.save((Trap(),), inner := tmp_path / "inner.pt")
    records[samples] = inner.read_bytes()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    for read in (load_exported, read_metadata):
        with pytest.raises(ExportError, match=r"net\.pt2.*export it again"):
            read(path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("net/data/constants/opaque_obj_0", b"")
    with pytest.raises(ExportError, match="code from the file would have to run"):
        load_exported(path)
    assert not canary.exists()


def test_the_page_counts_trials_and_names_what_went_wrong(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.jsonl", {"torch": "2"})
    kill = {"subject": "prune", "signal": "SIGKILL", "phase": "saving", "drafts": 1, "temporary": 0, "traceback": False}
    rows.add(campaign="kills", number=0, code=-9, wrong=[], **kill)
    rows.add(campaign="kills", number=1, code=-9, wrong=["another result"], **kill)
    rows.add(campaign=CAMPAIGN, specimen="plan", damage="cut", what="refused", said="")
    rows.add(campaign=CAMPAIGN, specimen="plan", damage="bits", what="executed", said="")
    rows.add(campaign="full disk", subject="prune", number=0, room=9, code=1, said="error: cannot write", wrong=[])
    rows.add(campaign="memory", step="score", number=0, megabytes=3, what="refused", said="RuntimeError")
    text = page(rows.rows)
    assert "| prune | 2 | 1 |" in text
    assert "another result" in text
    assert "executed" in text
    assert "| score | 1 |" in text


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_runs_that_are_killed_end_as_those_that_are_not(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.reliability", "--out", str(tmp_path / "rows.jsonl")]
    options = ["--work", str(tmp_path / "work"), "--kills", "8", "--damages", "0", "--disks", "0", "--memories", "0"]
    done = subprocess.run([*command, *options], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [
        row for row in Rows(tmp_path / "rows.jsonl", {"torch": torch.__version__}).rows if row["campaign"] == "kills"
    ]
    assert Counter(map(str, (row["wrong"] for row in found))) == {"[]": len(found)}
    assert len(found) >= 8
