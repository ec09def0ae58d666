"""What the speed benchmark makes of its rows; nothing is timed here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.library_speed.__main__ import main
from benchmarks.library_speed.measure import Options, measure
from benchmarks.library_speed.report import fitted, ratios, report
from benchmarks.zoo.families import Entry
from benchmarks.zoo.runner import Row


def peer_row(name: str, ours: float, theirs: float, outcome: str = "handles") -> Row:
    steps = dict.fromkeys(("trace", "score", "select", "mask", "compare"), 0.2)
    return {
        "key": f"torchvision/{name}", "suite": "torchvision", "kind": "cnn", "outcome": "pruned", "revision": "abc",
        "prune": {"steps": steps, "seconds": 1.2, "ratio": 1.2},
        "peer": {"outcome": outcome, "ours_seconds": ours, "seconds": theirs, "ours_stages": {"trace": ours}},
    }  # fmt: skip


def traced_row(name: str, operators: int, seconds: float) -> Row:
    key = {"key": f"timm/{name}", "suite": "timm", "kind": "cnn", "revision": "abc"}
    return {**key, "outcome": "traced", "operators": operators, "trace": seconds}


def test_report_names_what_misses_its_target() -> None:
    rows = [peer_row("a", 1.0, 2.0), peer_row("b", 2.0, 1.0), peer_row("c", 1.0, 1.0), peer_row("d", 1, 1, "error: x")]
    command = {"key": "command/--help", "suite": "command", "name": "--help", "target": 0.3, "seconds": 0.07}
    text = report([*rows, {**command, "revision": "abc"}], [traced_row("a", 10, 1.0), traced_row("b", 200, 20.0)])
    assert ratios(rows) == {"torchvision/a": 0.5, "torchvision/c": 1.0, "torchvision/b": 2.0}
    assert "Above 1.5: torchvision/b 2.00.\n" in text
    assert "Torch-Pruning does not get to the end on torchvision/d." in text
    assert "Median 1.20, worst 1.20 (torchvision/a); at most 1.3." in text
    assert "Above 12 s: timm/b 20.0 s.\n" in text
    assert "by kind cnn 1.00 and 100.00.\n" in text


@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_the_exponent_is_that_of_the_times(exponent: float) -> None:
    rows = [traced_row("a", count, 0.01 * count**exponent) for count in (10, 70, 900)]
    assert fitted(rows) == pytest.approx((exponent, 0.01))


def test_the_command_writes_report_and_pictures_from_rows(tmp_path: Path) -> None:
    for name, rows in (
        ("", [peer_row("a", 1.0, 2.0)]),
        ("_operators", [traced_row("a", 9, 1.0), traced_row("b", 8, 1)]),
    ):
        (tmp_path / f"library_speed{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["report", "--results", str(tmp_path)])
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".jsonl", ".jsonl", ".md", ".png", ".png"]


def test_operators_are_those_of_a_forward() -> None:
    row = measure(Entry("torchvision", "alexnet", "alexnet", "cnn"), Options(operators=True), lambda _: None)
    # 5 convolutions, 7 relus in place, 3 max pools, 1 adaptive pool, 1 flatten, 2 dropouts that do nothing, 3 linear
    # layers with a transposed weight each.
    assert (row["outcome"], row["operators"]) == ("traced", 5 + 7 + 3 + 1 + 1 + 2 * 3)
