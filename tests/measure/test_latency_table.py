"""A table of times: asked, kept as a file, refused where it does not hold."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from lightning_prune.engines import Eager
from lightning_prune.errors import TableError
from lightning_prune.measure import LatencyTable, LayerKind, LayerTimes, Surface
from lightning_prune.measure.portable.machine import this_machine

CONV = LayerKind("conv", (3, 3), (1, 1), (1, 1), (1, 1), 1, (8, 8), 2, norm=True, activation="relu")
LINEAR = LayerKind("linear", size=(1,))


def table(**changes) -> LatencyTable:
    """Channels in are faster in multiples of 4; channels out go in lanes of 16."""
    fast = Surface(((4, 64), (16, 64)), np.array([[1.0, 4.0], [16.0, 64.0]]), (4, 16), (4, 1))
    slow = Surface(((3, 63), (16, 64)), np.array([[2.0, 8.0], [32.0, 128.0]]), (1, 16), (4, 1), (False, True))
    line = LayerTimes((10, 10), (Surface(((1, 10), (1, 10)), np.array([[0.0, 9.0], [9.0, 18.0]])),))
    given = {"engine": "eager", "settings": repr(Eager()), "threads": 2, "versions": Eager().versions, **changes}
    return LatencyTable({CONV: LayerTimes((64, 64), (fast, slow)), LINEAR: line}, **given)


def test_bilinear_between_timed_widths() -> None:
    into, out = np.meshgrid(np.arange(1, 11), np.arange(1, 11), indexing="ij")
    assert np.allclose(table().time(LINEAR, into, out), into + out - 2)


def test_a_width_costs_what_the_next_multiple_of_the_lane_costs() -> None:
    assert table().time(CONV, 64, [1, 16, 17, 32, 33, 64]).tolist() == [16, 16, 32, 32, 48, 64]


def test_widths_that_are_not_aligned_have_times_of_their_own() -> None:
    assert np.allclose(table().time(CONV, [4, 36, 64, 3, 33, 63], 16), [1, 9, 16, 2, 17, 32])


def test_lanes_of_widths_that_are_not_aligned_end_before_a_multiple() -> None:
    surface = Surface(((7, 63), (1,)), np.array([[7.0], [63.0]]), (8, 1), (4, 1), (False, True))
    alone = LatencyTable({LINEAR: LayerTimes((64, 1), (surface,))}, engine="eager")
    assert np.allclose(alone.time(LINEAR, [1, 7, 9, 15, 17, 63], 1), [7, 7, 15, 15, 23, 63])


def test_channels_broadcast_and_none_take_no_time() -> None:
    times = table().time(LINEAR, np.arange(3)[:, None], np.arange(4))
    assert times.shape == (3, 4)
    assert (times[0] == 0).all()
    assert (times[:, 0] == 0).all()
    assert table().time(LINEAR, 3, 4).shape == ()


@pytest.mark.parametrize(
    ("kind", "channels", "said"),
    [
        (dataclasses.replace(CONV, batch=3), (4, 4), r"has no 3x3 conv at 8x8 relu \(batch 3\)"),
        (LINEAR, (11, 4), "from 0 to 10 channels in, asked for 11"),
        (LINEAR, (4, [3, 12]), "from 0 to 10 channels out, asked for 12"),
        (LINEAR, (-1, 4), "asked for -1"),
        (LINEAR, (1.5, 4), "are integers"),
    ],
)
def test_what_was_not_timed_is_refused(kind, channels, said) -> None:
    with pytest.raises(TableError, match=said):
        table().time(kind, *channels)


def test_a_file_holds_all_of_it(tmp_path) -> None:
    before = table(made="2026-01-01T00:00:00+00:00")
    before.save(tmp_path / "table.json")
    after = LatencyTable.load(tmp_path / "table.json")
    assert after.data() == before.data()
    assert after.time(CONV, 33, 17) == before.time(CONV, 33, 17)


def damaged(data, *path, value) -> str:
    *inner, last = path
    place = data
    for key in inner:
        place = place[key]
    place[last] = value
    return json.dumps(data)


SURFACE = ("layers", 0, "surfaces", 0)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("format",), "another", "is no latency table"),
        (("version",), 2, "has version 2 of the format, and this package reads 1"),
        (("layers", 0, "kind", "operator"), "pool", "no such operator"),
        (("layers", 0, "kind"), {}, "damaged"),
        (("layers", 0, "surfaces"), [], "a layer without times"),
        ((*SURFACE, "milliseconds"), [[1.0, 2.0]], r"must be \(2, 2\) numbers"),
        ((*SURFACE, "milliseconds", 0, 0), float("nan"), r"must be \(2, 2\) numbers"),
        ((*SURFACE, "milliseconds", 0, 0), -1.0, r"must be \(2, 2\) numbers"),
        ((*SURFACE, "milliseconds", 0, 0), "fast", "damaged"),
        ((*SURFACE, "widths", 0), [64, 4], "widths must rise"),
        ((*SURFACE, "lanes"), [0, 1], "lanes and alignment"),
        (("threads",), 0, "threads a number"),
        (("machine",), None, "damaged"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, path, value, said) -> None:
    file = tmp_path / "table.json"
    file.write_text(damaged(table().data(), *path, value=value), encoding="utf-8")
    with pytest.raises(TableError, match=said) as refused:
        LatencyTable.load(file)
    assert str(file) in str(refused.value)


@pytest.mark.parametrize("content", ["", "[]", '"latency"', "\x00\x01", json.dumps(table().data())[:-20]])
def test_a_foreign_or_truncated_file_is_refused(tmp_path, content) -> None:
    (tmp_path / "table.json").write_text(content, encoding="utf-8")
    with pytest.raises(TableError, match="is no latency table" if content else "is empty"):
        LatencyTable.load(tmp_path / "table.json")
    with pytest.raises(TableError, match="there is no file"):
        LatencyTable.load(tmp_path / "none.json")


def test_another_machine_is_refused_unless_forced(tmp_path) -> None:
    table(machine={**this_machine(), "cpu": "Raspberry Pi 4"}).save(tmp_path / "pi.json")
    with pytest.raises(TableError, match=r"another machine.*cpu: Raspberry Pi 4 there, .* here"):
        LatencyTable.load(tmp_path / "pi.json")
    there = LatencyTable.load(tmp_path / "pi.json", force=True)
    with pytest.raises(TableError, match="Raspberry Pi 4"):
        there.check("eager")
    there.check("eager", force=True)


@pytest.mark.parametrize(
    ("changes", "engine", "threads", "said"),
    [
        ({}, "compile", None, "engine: eager there, compile here"),
        ({}, "eager", 1, "threads: 2 there, 1 here"),
        ({"settings": "Eager('bf16')"}, "eager", None, r"settings: Eager\('bf16'\) there"),
        ({"versions": {"torch": "1.0"}}, "eager", None, "torch: 1.0 there"),
    ],
)
def test_another_engine_is_refused(changes, engine, threads, said) -> None:
    table().check("eager", 2)
    with pytest.raises(TableError, match=said):
        table(**changes).check(engine, threads)
