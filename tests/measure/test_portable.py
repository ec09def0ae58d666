"""What times layers where there is no torch: steps, rounds, and the folder that is copied there."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_prune.errors import PruningError
from lightning_prune.measure import LatencyTable, write_profile_kit
from lightning_prune.measure.portable import standalone
from lightning_prune.measure.portable.machine import this_machine
from lightning_prune.measure.portable.rounds import LEAST, MOST, time_in_turns
from lightning_prune.measure.portable.widths import FIRST, LAST, Steps, find_steps, grid

SOURCES = sorted(Path(standalone.__file__).parent.glob("*.py"))
WIDTHS = np.arange(FIRST, LAST + 1)
CURVES = {
    Steps(1, 1, 1): WIDTHS,
    Steps(1, 8, 1): -(-WIDTHS // 8) * 8,
    Steps(1, 16, 1): -(-WIDTHS // 16) * 16,
    Steps(1, 32, 1): -(-WIDTHS // 32) * 32,
    Steps(4, 16, 1): np.where(WIDTHS % 4 == 0, -(-WIDTHS // 16) * 16, 1.6 * WIDTHS),
    Steps(8, 8, 1): np.where(WIDTHS % 8 == 0, WIDTHS, 1.5 * WIDTHS),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("steps", CURVES, ids=str)
def test_steps_are_found_in_noise(steps, seed) -> None:
    noise = np.random.default_rng(seed).normal(1, 0.01, len(WIDTHS))
    assert find_steps(CURVES[steps] * noise) == steps


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("steps", [Steps(1, 16, 1), Steps(1, 32, 1), Steps(1, 8, 1)], ids=str)
def test_a_fifth_of_the_times_may_be_disturbed(steps, seed) -> None:
    random = np.random.default_rng(seed)
    disturbed = np.where(random.random(len(WIDTHS)) < 0.2, random.uniform(2, 8, len(WIDTHS)), 1)
    assert find_steps(CURVES[steps] * disturbed * random.normal(1, 0.01, len(WIDTHS))) == steps


@pytest.mark.parametrize("steps", [Steps(), Steps(1, 16), Steps(4, 16, 1), Steps(8, 8, 2)])
@pytest.mark.parametrize("largest", [1, 2, 3, 5, 16, 17, 64, 1000, 1001])
def test_the_grid_spans_every_width_of_both_classes(largest, steps) -> None:
    for coarse in (False, True):
        aligned = grid(largest, steps, True, coarse)
        others = grid(largest, steps, False, coarse)
        assert sorted({*aligned, *others}) == sorted([*aligned, *others])
        assert all(0 < width <= largest for width in (*aligned, *others))
        assert all(width % steps.alignment == 0 for width in aligned)
        assert all(width % steps.alignment for width in others)
        assert largest in (*aligned, *others)
        assert len(aligned) < 12
        assert bool(aligned) == (largest >= steps.alignment)
        assert bool(others) == (steps.alignment > 1)


def test_rounds_end_when_times_are_stable_or_after_the_most() -> None:
    now = [0.0]
    runs = [0, 0]

    def spend(which: int, seconds) -> None:
        runs[which] += 1
        now[0] += seconds(runs[which])

    def clock() -> float:
        return now[0]

    steady = [lambda: spend(0, lambda run: 0.25), lambda: spend(1, lambda run: 0.5)]
    assert time_in_turns(steady, clock) == [250.0, 500.0]
    assert runs[0] == runs[1] <= LEAST + 2
    runs[:] = 0, 0
    wild = [lambda: spend(0, lambda run: 1 + run % 2), lambda: spend(1, lambda run: 1 + run % 2)]
    assert time_in_turns(wild, clock) == [1000.0, 1000.0]  # what disturbs only adds
    assert runs[0] == MOST + 2


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_sources_are_of_python_3_8_and_need_numpy_alone(path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names.append(node.module)
        roots = {name.partition(".")[0] for name in names} - {"numpy", "onnxruntime"}
        assert roots <= set(sys.stdlib_module_names)
    lazy = any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body)
    assert lazy or len(tree.body) == 1  # annotations are of newer Pythons, and not run
    assert not any(
        isinstance(node, ast.Call) and any(k.arg == "strict" for k in node.keywords) for node in ast.walk(tree)
    )


WITHOUT_TORCH = """
import runpy, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "lightning_prune", "onnx", "pytorch_lightning"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
sys.argv[:] = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_kit(script: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-c", WITHOUT_TORCH, str(script), *argv]
    return subprocess.run(command, capture_output=True, text=True, cwd=script.parent, timeout=120)


@pytest.fixture
def kit(tmp_path) -> Path:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    return write_profile_kit(tmp_path / "kit", net, torch.zeros(1, 3, 4, 4), threads=1)


def test_the_kit_makes_a_table_without_torch_and_goes_on_after_an_interruption(kit) -> None:
    pytest.importorskip("onnxruntime")
    size = sum(path.stat().st_size for path in kit.parent.rglob("*") if path.is_file())
    assert size < 120_000
    done = run_kit(kit)
    assert done.returncode == 0, done.stderr
    assert "100 %" in done.stderr
    assert "table.json" in done.stdout
    table = LatencyTable.load(kit.parent / "table.json")
    assert (table.engine, table.threads, table.machine) == ("onnxruntime", 1, this_machine())
    table.check("onnxruntime", 1)
    assert 0 < table.whole_ms < 1000
    assert f"takes {table.whole_ms:.2f} ms here with 1 threads" in done.stdout
    assert not table.elsewhere
    assert [str(kind) for kind in table.layers] == ["3x3 conv at 4x4 relu", "linear at 1"]

    points = kit.parent / standalone.POINTS
    head, *lines = points.read_text(encoding="utf-8").splitlines()
    times = {name: 7.0 for line in lines for name in json.loads(line)}
    points.write_text(f'{head}\n{json.dumps(times)}\n{{"cut o', encoding="utf-8")
    again = run_kit(kit, "--out", "again.json")
    assert f"{len(times)} times are known from before" in again.stdout
    layers = LatencyTable.load(kit.parent / "again.json").layers.values()
    assert {float(time) for layer in layers for each in layer.surfaces for time in each.milliseconds.flat} == {0.0}


def test_times_of_other_circumstances_are_not_used(tmp_path) -> None:
    path = tmp_path / "points.jsonl"
    standalone.Points(path, {"threads": 1}).keep({"a": 1.0})
    assert standalone.Points(path, {"threads": 1}).known == {"a": 1.0}
    assert standalone.Points(path, {"threads": 2}).known == {}
    assert standalone.Points(path, {"threads": 2}).known == {}


def test_a_kit_says_what_is_missing(kit, capsys) -> None:
    pytest.importorskip("onnxruntime")
    assert standalone.main(kit.parent, ["--provider", "MagicProvider"]) == 1
    assert "has no MagicProvider; it has " in capsys.readouterr().err


def test_a_kit_is_not_written_over_a_file(tmp_path) -> None:
    (tmp_path / "kit").write_text("mine", encoding="utf-8")
    with pytest.raises(PruningError, match="it is a file"):
        write_profile_kit(tmp_path / "kit", nn.Linear(2, 2), torch.zeros(1, 2))
