"""The users' zoo: its tables, the inputs that are checked beside the traced ones, what the report says of it."""

from __future__ import annotations

import json
import threading
import time
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.zoo import measure, runner, users
from benchmarks.zoo.__main__ import main
from benchmarks.zoo.families import SUITES, Entry, entries
from benchmarks.zoo.measure import Options, sweep_one
from benchmarks.zoo.models import prepare
from benchmarks.zoo.report import report
from benchmarks.zoo.users import LIBRARIES, Model

NEEDS = {
    "ultralytics": "ultralytics", "smp": "segmentation_models_pytorch", "transformers": "transformers",
    "diffusers": "diffusers", "monai": "monai", "spandrel": "spandrel", "pytorchcv": "pytorchcv",
    "facenet": "facenet_pytorch", "kornia": "kornia",
}  # fmt: skip
#: Of each library a model that is built in no time.
SMALL = {
    "ultralytics": "yolov8n", "smp": "FPN-mobilenet_v2", "transformers": "regnet", "diffusers": "AutoencoderTiny",
    "monai": "DynUNet-2d", "video": "mc3_18", "audio": "CNN-GRU", "spandrel": "SRVGG", "pytorchcv": "mobilenet_wd4",
    "facenet": "ONet", "kornia": "HardNet",
}  # fmt: skip


def row(name: str, outcome: str = "pruned", **more) -> dict:
    base = {"suite": "monai", "name": name, "key": f"monai/{name}", "family": name, "kind": "cnn", "outcome": outcome}
    return {**base, "seconds": {}, **more}


class Paired(nn.Module):
    """Takes two inputs by name, and one size of images only if told so."""

    def __init__(self, *, strict: bool = False, single: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.strict, self.single = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), strict, single
        self.feature_hooks = None  # as in timm's features

    def forward(self, image: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.strict and image.shape[2] != 8:
            raise ValueError("of 8 pixels only")
        if self.single and image.dtype == torch.float64 and image.shape[2] == 12:
            raise TypeError("float32 only")
        return {"out": self.second(self.first(image).relu() * scale)}


def named(batch: int, size: users.model.Size) -> dict[str, torch.Tensor]:
    return {"image": users.images(batch, size), "scale": torch.tensor(0.5)}


@pytest.fixture
def of_our_own(monkeypatch):
    """Puts a model in the table of a library, and gives its entry."""

    def put(build, **more) -> Entry:
        table = {"own": Model(build, "own", sizes=((8, 8), (12, 8)), inputs=named, **more)}
        monkeypatch.setattr(users, "models", lambda suite: table)
        return Entry("monai", "own", "own", "cnn")

    return put


def test_there_are_200_models_in_families_of_one_library_each() -> None:
    found = entries("users")
    assert len(found) >= 200
    assert not [key for key, count in Counter(entry.key for entry in found).items() if count > 1]
    assert {entry.suite for entry in found} == set(LIBRARIES)
    assert {entry.kind for entry in found} == {"cnn", "hybrid", "transformer", "other"}
    assert not {entry.suite for entry in entries("all")} & set(LIBRARIES)
    assert not set(SUITES) & set(LIBRARIES)


def test_parts_share_out_everything_once() -> None:
    parts = [entries("users", part=f"{i}/2") for i in (1, 2)]
    assert sorted(e.key for part in parts for e in part) == sorted(e.key for e in entries("users"))


@pytest.mark.parametrize("suite", LIBRARIES)
def test_a_model_of_every_library_runs_at_its_sizes(suite: str) -> None:
    if suite in NEEDS:
        pytest.importorskip(NEEDS[suite])
    entry = next(entry for entry in entries(suite) if entry.name == SMALL[suite])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what libraries say while they build
        case = prepare(entry)
    assert case.trains
    assert not case.model.training
    assert len(case.others) == 1 + (len(users.models(suite)[entry.name].sizes) > 1)


def test_another_batch_and_another_size_are_compared(of_our_own) -> None:
    found = sweep_one(of_our_own(Paired), Options())
    assert found["outcome"] == "pruned"
    assert list(found["checked"]) == ["2 of 8x8", "3 of 8x8", "1 of 12x8"]
    assert found["max_rel_error"] == max(found["checked"].values()) < 1e-10
    assert found["removed"] == round(1 - found["params_after"] / found["params"], 4) > 0.4
    assert [found[name] for name in ("no_trace_left", "copies", "train_step")] == [True] * 3
    assert "dtype" not in found
    assert json.loads(json.dumps(found)) == found


def test_a_model_of_one_size_is_compared_at_another_batch(of_our_own) -> None:
    found = sweep_one(of_our_own(lambda: Paired(strict=True)), Options())
    assert found["outcome"] == "pruned"
    assert list(found["checked"]) == ["2 of 8x8", "3 of 8x8"]


def test_a_model_that_refuses_float64_is_compared_in_float32(of_our_own) -> None:
    found = sweep_one(of_our_own(lambda: Paired(single=True)), Options())
    assert found["outcome"] == "pruned"
    assert found["dtype"] == "float32"


def test_an_error_at_the_other_size_is_wrong(of_our_own, monkeypatch) -> None:
    real = measure.lp.check_lossless

    def worse(model, small, inputs):
        found = real(model, small, inputs)
        return replace(found, max_rel_error=0.5) if inputs["image"].shape[2] == 12 else found

    monkeypatch.setattr(measure.lp, "check_lossless", worse)
    found = sweep_one(of_our_own(Paired), Options())
    assert found["outcome"] == "wrong: relative error 5.0e-01"
    assert found["prune"] == "pruned"  # what the user would get


class Slow:
    """In place of a worker process."""

    def __init__(self, *_: object) -> None:
        self.thread = threading.get_ident()

    def __enter__(self) -> Slow:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.thread == threading.get_ident()

    def run(self, entry: Entry, *_: object) -> dict:
        time.sleep(0.02)
        return {**row(entry.name), "key": entry.key, "thread": self.thread}


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_share_the_models(workers: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(runner, "Worker", Slow)
    path = tmp_path / "rows.jsonl"
    main(["--suite", "audio", "--results", str(path), "--workers", str(workers)])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(found["key"] for found in rows) == sorted(entry.key for entry in entries("audio"))
    assert len({found["thread"] for found in rows}) == workers


def test_what_was_not_pruned_is_tried_again(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(runner, "Worker", Slow)
    path = tmp_path / "rows.jsonl"
    outcomes = {entry.key: "error: x" if entry.name == "M5" else "pruned" for entry in entries("audio")}
    path.write_text("".join(json.dumps({"key": k, "outcome": v}) + "\n" for k, v in outcomes.items()))
    main(["--suite", "audio", "--results", str(path)])
    assert len(path.read_text().splitlines()) == len(outcomes)
    main(["--suite", "audio", "--results", str(path), "--retry"])
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()[len(outcomes) :]] == ["audio/M5"]


def test_no_model_is_begun_when_time_is_up(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(runner, "Worker", Slow)
    main(["--suite", "audio", "--results", str(tmp_path / "rows.jsonl"), "--limit-seconds", "0", "--workers", "2"])
    assert f"time is up; {len(entries('audio'))} models left" in capsys.readouterr().out


def test_report_says_how_much_went_and_what_holds_the_rest() -> None:
    rows = [
        row("a", removed=0.7, checked={"x": 0.0, "y": 0.0, "z": 0.0}, max_rel_error=0.0),
        row("b", removed=0.2, kept_by_reason={"a layer norm": 0.61, "little": 0.01}, max_rel_error=0.0),
        row("c", outcome="wrong: relative error 1", removed=0.6, prune="refused: it differs"),
        row("d", kind="hybrid", removed=0.5, checked={"x": 0.0, "y": 0.0}, max_rel_error=0.0),
        row("e", kind="transformer", removed=0.3, max_rel_error=0.0),
    ]
    text = report(rows)
    lines = [line.split() for line in text.splitlines()]
    assert "| cnn | 3 | 0.20 | 0.00 | 0.00 | 2 |".split() in lines
    assert "| hybrid or transformer | 2 | 0.40 | 0.30 | 0.30 | 1 |".split() in lines
    for part in (
        "monai/b (cnn) 0.20: 61% a layer norm\n",
        "Of 2 models compared, 1 take another batch and another size than was traced, 1 only one of them, 0 neither.",
        "wrong: relative error 1; prune(): refused: it differs",
    ):
        assert part in text


def test_the_report_is_written_after_a_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows, text = tmp_path / "rows.jsonl", tmp_path / "report.md"
    rows.write_text(json.dumps(row("DynUNet-2d", max_rel_error=0.0)) + "\n" + json.dumps({**row("a"), "suite": "timm"}))
    main(["--suite", "monai", "--only", "DynUNet-2d", "--results", str(rows), "--write", str(text)])
    assert "0 models to do" in capsys.readouterr().out
    assert "DynUNet-2d" in text.read_text()
    assert "timm" not in text.read_text()
    main(["report", "--suite", "users", "--results", str(rows)])
    assert "DynUNet-2d" in capsys.readouterr().out
