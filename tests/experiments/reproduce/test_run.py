"""Cells are what pruning by hand gives, are never computed twice, and a row that fails leaves the others."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

import lightning_prune as lp
from lightning_prune.errors import ConfigurationError, DataError, PlanError
from lightning_prune.experiments.reproduce import Cell, Refused, Reproduction, reproduce
from lightning_prune.experiments.reproduce.cells import Study
from lightning_prune.experiments.reproduce.page import sections
from tests.experiments.reproduce.tiny import CONTENT, HERE, SGD, Counting, recipe, smoke

BROKEN = {"label": "broken", "model": "net", "criterion": {"class_path": f"{HERE}.Broken"}}
REFUSED = {
    "label": "refused",
    "model": "net",
    "criterion": "l1",
    "selection": {"class_path": "lightning_prune.LayerRatio", "init_args": {"ignore": ["nothing*"]}},
}


def run(folder: Path, changes: dict | None = None, **options) -> Reproduction:
    Counting.steps = 0
    return reproduce(recipe(changes), "smoke", folder, **options)


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Reproduction, Path]:
    folder = tmp_path_factory.mktemp("reproduce")
    return run(folder, seeds=[0, 1]), folder


def test_there_is_a_cell_for_every_row_and_seed(computed) -> None:
    found, folder = computed
    assert [(cell.row, cell.seed) for cell in found.cells] == [
        (row, seed) for row in ("net", "net L1 .5", "net GM .5") for seed in (0, 1)
    ]
    assert not found.refused
    assert found.complete
    assert len(list((folder / "cells").glob("net-*.json"))) == 6
    assert len(list((folder / "cells").glob("dense-net-seed*.json"))) == len(list(folder.glob("dense-*.ckpt"))) == 2
    dense, *pruned = (cell for cell in found.cells if cell.seed == 1)
    assert dense.values["left"] == 100
    for cell in pruned:
        assert cell.values["change"] == pytest.approx(cell.values["acc"] - dense.values["acc"])
        assert cell.values["left"] < 100
        assert len(cell.curve) == 1
        assert {"train_loss", "val_loss", "accuracy", "elapsed_seconds"} <= set(cell.curve[0])
        assert cell.more["lossless"] < 1e-10
        assert 0 <= cell.values["acc"] <= 100


def test_a_cell_is_what_pruning_its_dense_model_leaves(computed) -> None:
    found, folder = computed
    study = Study(found.recipe, found.scale, folder, None)
    task = study.task("net", "dense", study.dense("net", 0).weights)
    result = lp.prune(task, task.example_input_array, selection=lp.LayerRatio(0.5), coupling="union", criterion="l1")
    cell = next(cell for cell in found.cells if (cell.row, cell.seed) == ("net L1 .5", 0))
    assert cell.values["params"] == lp.measure.count_params(result.model)
    assert cell.values["flops"] == lp.measure.count_flops(result.model, task.example_input_array, "paper")


def test_costs_are_those_of_the_published_network(computed) -> None:
    found, _ = computed
    assert [cell.row for cell in found.costs] == ["net", "net GM .5"]
    net = recipe().models["net"]["init_args"]["width"]
    assert net == 16
    from tests.experiments.reproduce.tiny import TinyNet

    flops = lp.measure.count_flops(TinyNet(16), torch.zeros(1, 3, 8, 8), "paper")
    assert found.costs[0].values["flops"] == pytest.approx(flops / 1e6)
    assert found.costs[0].values["flops_spread"] == 0
    assert found.costs[1].values["flops_spread"] > 0
    assert found.costs[1].values["params"] < found.costs[0].values["params"]


def test_a_second_run_computes_nothing(computed) -> None:
    found, folder = computed
    again = run(folder, seeds=[0, 1])
    assert Counting.steps == 0
    assert again.cells == found.cells
    assert again.costs == found.costs


def test_only_what_is_missing_is_computed(computed, tmp_path: Path) -> None:
    run(tmp_path, only=["L1"])
    first = Counting.steps  # dense training and one fine-tuning
    stamps = {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    found = run(tmp_path)
    assert 0 < Counting.steps < first
    assert len(found.cells) == 3
    assert {name: (tmp_path / "cells" / name).stat().st_mtime_ns for name in stamps if name.endswith(".json")} == {
        name: stamp for name, stamp in stamps.items() if name.endswith(".json")
    }


class Killed(BaseException):
    """As if the process had ended here."""


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    done: list[Cell | Refused] = []

    def kill(outcome: Cell | Refused) -> None:
        done.append(outcome)
        raise Killed

    with pytest.raises(Killed):
        run(tmp_path, on_outcome=kill)
    assert [outcome.row for outcome in done] == ["net"]
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert len(stamps) == 5  # two costs, the dense network and its weights, its row
    found = run(tmp_path)
    assert [cell.row for cell in found.cells] == ["net", "net L1 .5", "net GM .5"]
    assert found.cells[0] == done[0]
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


@pytest.mark.parametrize("order", ["A", "B"])
def test_a_killed_training_goes_on_after_its_last_whole_epoch(order: str, tmp_path: Path) -> None:
    three = {"epochs": 3, "optimizer": SGD}
    changes = {"prune": {"order": order}, **smoke(dense=three, tune=three, choose="best")}
    names: list[tuple[str, int]] = []
    whole = run(
        tmp_path / "whole", changes, only=["L1"], on_progress=lambda name, row: names.append((name, row["epoch"]))
    )
    dense, tuned = "dense-net-seed0", "net-L1-.5-seed0"
    assert names == [(name, epoch) for name in (dense, tuned) for epoch in range(3)]

    names.clear()

    def kill(name: str, row: dict) -> None:
        names.append((name, row["epoch"]))
        if names in ([(dense, 0), (dense, 1)], [*killed, (dense, 1), (dense, 2), (tuned, 0), (tuned, 1), (tuned, 2)]):
            killed[:] = names
            raise Killed

    killed: list[tuple[str, int]] = []
    for _ in range(2):
        with pytest.raises(Killed):
            run(tmp_path / "killed", changes, only=["L1"], on_progress=kill)
    began = time.perf_counter()
    found = run(tmp_path / "killed", changes, only=["L1"], on_progress=kill)
    took = time.perf_counter() - began
    assert names == [*killed, (tuned, 2)]
    assert not list((tmp_path / "killed" / "cells").glob("*.ckpt"))
    (cell,), (expected,) = found.cells, whole.cells
    assert cell.values.keys() == expected.values.keys()
    timed = {"time", "epoch"}
    assert {k: v for k, v in cell.values.items() if k not in timed} == {
        k: v for k, v in expected.values.items() if k not in timed
    }
    for name in ("epoch", "train_loss", "val_loss", "accuracy"):
        assert [row[name] for row in cell.curve] == [row[name] for row in expected.curve]
    elapsed = [row["elapsed_seconds"] for row in cell.curve]
    assert elapsed == sorted(elapsed)
    assert cell.seconds > elapsed[1]
    assert cell.seconds < took + elapsed[1]


def test_precision_is_of_training_and_its_cells_are_others(tmp_path: Path) -> None:
    exact = run(tmp_path, only=["L1"])
    coarse = run(tmp_path, only=["L1"], precision="bf16-mixed")
    assert Counting.steps
    assert coarse.cells[0].curve[0]["train_loss"] != exact.cells[0].curve[0]["train_loss"]
    assert coarse.cells[0].more["lossless"] < 1e-10
    texts = [" ".join(text for section in sections(found) for text in section.text) for found in (exact, coarse)]
    assert ["Trained in bf16-mixed: " in text for text in texts] == [False, True]
    with pytest.raises(ConfigurationError, match="precision must be one of"):
        run(tmp_path, precision="bf8")


def test_a_dense_model_whose_weights_are_lost_is_trained_again(tmp_path: Path) -> None:
    first = run(tmp_path, only=["L1"])
    for path in tmp_path.glob("dense-*.ckpt"):
        path.unlink()
    second = run(tmp_path, only=["L1", "GM"])
    assert second.cells[0] == first.cells[0]
    assert len(list(tmp_path.glob("dense-*.ckpt"))) == 1


def test_a_row_that_is_refused_or_breaks_leaves_the_others(tmp_path: Path) -> None:
    changes = {"rows": [CONTENT["rows"][0], REFUSED, BROKEN, CONTENT["rows"][1]]}
    found = run(tmp_path, changes)
    assert [cell.row for cell in found.cells] == ["net", "net L1 .5"]
    refused, broken = found.refused
    assert "nothing*" in refused.reason
    assert "RuntimeError: the machine went down" in broken.reason
    (report,) = (tmp_path / "errors").iterdir()
    assert str(report) in broken.reason
    assert "Traceback" in report.read_text()
    assert found.complete


def test_ctrl_c_leaves_what_is_there(tmp_path: Path) -> None:
    def interrupt(outcome: Cell | Refused) -> None:
        raise KeyboardInterrupt

    found = run(tmp_path, on_outcome=interrupt)
    assert not found.complete
    assert [cell.row for cell in found.cells] == ["net"]


@pytest.mark.parametrize(
    "changes",
    [
        smoke(tune={"epochs": 2}),
        smoke(dense={"epochs": 2}),
        smoke(data={"init_args": {"batch_size": 128}}),
        {"prune": {"order": "B"}},
        {"prune": {"ratio": 0.25}},
        smoke(choose="best"),
    ],
)
def test_cells_of_other_settings_are_not_taken(changes: dict, computed) -> None:
    found, folder = computed
    row = recipe(changes).rows[1]
    study = Study(recipe(changes), recipe(changes).scale("smoke"), folder, None)
    assert not study.row_path(row, 0).is_file()
    assert Study(found.recipe, found.scale, folder, None).row_path(row, 0).is_file()


def test_the_same_seed_gives_the_same_numbers(computed, tmp_path: Path) -> None:
    found, _ = computed
    (again,) = run(tmp_path, only=["L1"], seeds=[1]).cells
    first = next(cell for cell in found.cells if (cell.row, cell.seed) == (again.row, 1))
    keys = ("acc", "flops", "params", "change")
    assert {key: again.values[key] for key in keys} == {key: first.values[key] for key in keys}


def test_both_orders_leave_models_of_the_same_cost(tmp_path: Path) -> None:
    rows = [{"label": order, "model": "net", "criterion": "l1", "order": order} for order in ("A", "B")]
    found = run(tmp_path, {"rows": [CONTENT["rows"][0], *rows]})
    assert found.cells[1].values["params"] == found.cells[2].values["params"]


def test_data_that_are_not_there_are_refused_before_the_work(tmp_path: Path) -> None:
    data = {
        "class_path": "lightning_prune.data.ImageFolderDataModule",
        "init_args": {"root": "{data}/letters"},
    }
    with pytest.raises(ConfigurationError, match="say with --data where letters lies"):
        run(tmp_path, smoke(data=data))
    with pytest.raises(DataError, match="letters"):
        run(tmp_path, smoke(data=data), data=str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seeds", [[0, 0], [-1]])
def test_wrong_seeds_are_refused(seeds: list[int], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="seeds must be"):
        run(tmp_path, seeds=seeds)
