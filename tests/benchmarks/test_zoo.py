"""The sweep over torchvision and timm: what it takes, what it writes, one small model from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.zoo import families, runner
from benchmarks.zoo.__main__ import main
from benchmarks.zoo.families import Entry, entries
from benchmarks.zoo.measure import Options, _kind_of, sweep_one
from benchmarks.zoo.models import RawHeads, equal, outputs, prepare, randomise_, train_step
from benchmarks.zoo.report import family_share, report, table, time_ratio


def row(name: str = "a", outcome: str = "pruned", **more) -> dict:
    base = {"suite": "timm", "name": name, "key": f"timm/{name}", "family": name, "kind": "cnn", "outcome": outcome}
    return {**base, "seconds": {}, "max_rel_error": 1e-15, "effect": 1.0, **more}


def test_all_of_torchvision_is_taken() -> None:
    counts = {suite: len(entries(suite)) for suite in families.SUITES if suite != "timm"}
    assert counts["torchvision"] >= 80
    assert counts["segmentation"] >= 6
    assert counts["detection"] >= 12
    assert {e.kind for e in entries("torchvision")} == {"cnn", "hybrid", "transformer"}


def test_every_timm_file_is_taken() -> None:
    timm = pytest.importorskip("timm")
    from timm.models._registry import _model_to_module

    listed = {entry.family for entry in families.timm_entries()}
    assert set(_model_to_module.values()) <= listed
    known = set(timm.list_models())
    for entry in families.timm_entries():
        assert entry.name in known
        assert _model_to_module[entry.name] == entry.family


def test_families_have_one_kind() -> None:
    kinds = {}
    for entry in families.timm_entries():
        assert kinds.setdefault(entry.family, entry.kind) == entry.kind
    assert len(kinds) == sum(len(of) for of in families.TIMM_KINDS.values())


def test_parts_share_out_everything_once() -> None:
    parts = [entries("segmentation", part=f"{i}/4") for i in range(1, 5)]
    assert sorted(e.key for part in parts for e in part) == sorted(e.key for e in entries("segmentation"))


@pytest.mark.parametrize("part", ["0/3", "4/3", "x", "1/"])
def test_impossible_parts_are_refused(part: str) -> None:
    with pytest.raises(ValueError, match="--part"):
        entries("segmentation", part=part)


def test_the_last_complete_row_of_a_model_counts(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row(outcome="error: x")) + "\n" + json.dumps(row()) + '\n{"key": "timm/b", "outc')
    assert {key: r["outcome"] for key, r in runner.read_rows(path).items()} == {"timm/a": "pruned"}
    assert runner.read_rows(tmp_path / "none") == {}


def test_a_row_is_done_if_it_has_what_is_asked_for() -> None:
    assert runner.is_done(row(), Options())
    assert not runner.is_done(None, Options())
    assert not runner.is_done(row(), Options(peer=True))
    assert not runner.is_done(row(export=True), Options(export=True, memory=True))
    assert runner.is_done(row(outcome="error: x"), Options(export=True))


def test_reasons_are_counted_without_their_place() -> None:
    places = [f"has a size that is fixed in the Python code around aten.view at 'layer{i}.0'" for i in (1, 2)]
    assert len({_kind_of(place) for place in places}) == 1
    assert _kind_of("reaches the model's output") == "reaches the model's output"


def test_report_names_everything_that_failed() -> None:
    rows = [
        row("a", peer={"outcome": "handles", "seconds": 2.0, "ours_seconds": 1.0}),
        row("b", outcome="refused: for a | reason", peer={"outcome": "handles"}),
        row("c", peer={"outcome": "error: x"}, train_step="RuntimeError: boom"),
        row("d", outcome="wrong: relative error 1.0e-02"),
        row("e", effect=1e-12),
    ]
    text = report(rows)
    for part in (
        "timm/b (cnn): refused: for a | reason",
        "timm/c: train_step = RuntimeError: boom",
        "timm/d (cnn): wrong",
        "timm/e: vacuous",
        "Only Torch-Pruning (1): timm/b",
        "Only this library (1): timm/c",
        "| 0.50",
    ):
        assert part in text
    assert time_ratio(rows[0]) == 0.5
    assert time_ratio(rows[1]) is None
    assert family_share(rows) == "2 / 5 = 40.0%"
    assert report([]).startswith("# Zoo")


def test_tables_keep_their_columns() -> None:
    lines = table(("a", "b"), [("x|y", "1"), ("z", "two\nlines")]).splitlines()
    assert [line.count("|") for line in lines] == [3] * 4


def test_nothing_stays_at_its_initial_value() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)).train()
    nn.init.normal_(model[2].weight, std=1e-3)
    randomise_(model, torch.randn(2, 3, 8, 8))
    norm = model[1]
    assert not model.training
    assert norm.momentum == 0.1
    assert model[2].weight.std() > 0.1
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var, model[0].bias):
        assert len(tensor.unique()) == len(tensor)


def test_equal_sees_one_bit() -> None:
    value = torch.tensor([1.0, torch.nan])
    assert equal([value], [value.clone()])
    assert not equal([value], [torch.tensor([1.0 + 1e-7, torch.nan])])
    assert not equal([value], [])


def test_a_step_without_gradient_is_a_failure() -> None:
    frozen = nn.Sequential(nn.Linear(2, 2), nn.Identity())
    frozen[0].weight.requires_grad_(False)
    train_step(frozen, torch.ones(1, 2))
    frozen[0].bias.data.fill_(torch.inf)
    with pytest.raises(RuntimeError, match="not finite"):
        train_step(frozen, torch.ones(1, 2))


def test_one_model_from_end_to_end() -> None:
    found = sweep_one(Entry("torchvision", "squeezenet1_1", "squeezenet", "cnn"), Options())
    assert found["outcome"] == "pruned"
    assert found["max_rel_error"] < 1e-10
    assert found["effect"] > 1e-3
    assert found["params_after"] < found["params"]
    assert found["flops"][1] < found["flops"][0]
    assert [found[name] for name in ("no_trace_left", "copies", "train_step")] == [True] * 3
    assert set(found["seconds"]) >= {"forward", "trace", "score", "select", "reconstruct", "verify"}
    assert json.loads(json.dumps(found)) == found
    assert "squeezenet1_1" in report([found])


def test_heads_of_detectors_are_compared_raw() -> None:
    case = prepare(Entry("detection", "ssdlite320_mobilenet_v3_large", "ssdlite", "cnn"))
    found = outputs(RawHeads(case.model), case.inputs)
    assert all(tensor.dim() == 3 and len(tensor) == 2 for tensor in found)


def test_a_model_that_cannot_be_built_is_an_error_row() -> None:
    found = sweep_one(Entry("torchvision", "no_such_model", "none", "cnn"), Options())
    assert found["outcome"].startswith("error: the dense model:")


def test_a_worker_that_takes_too_long_is_replaced(tmp_path: Path) -> None:
    entry = Entry("torchvision", "squeezenet1_1", "squeezenet", "cnn")
    with runner.Worker(tmp_path / "log", 12.0, "benchmarks.zoo") as worker:
        found = worker.run(entry, Options(), 0.2)
        assert worker._process is None
    assert found["outcome"] == "error: not done after 0.2 s"
    assert found["key"] == entry.key


def test_command_line_reports(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row()) + "\n")
    main(["--report", "--results", str(path)])
    assert "timm: cnn" in capsys.readouterr().out
    main(["list", "--suite", "detection", "--only", "fcos"])
    assert capsys.readouterr().out == "detection/fcos_resnet50_fpn  fcos  cnn\n"
