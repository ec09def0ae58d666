"""Criteria side by side: the cells are what pruning by hand gives, are never computed twice, and never mixed."""

from __future__ import annotations

import csv
import importlib
import io
import json
import linecache
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from lightning_prune.cli import main
from lightning_prune.criteria import JRE, L1, Random
from lightning_prune.criteria.base import WeightCriterion
from lightning_prune.data import DigitsDataModule
from lightning_prune.errors import PlanError, PruningError, ScoreError
from lightning_prune.experiments.comparison import (
    Cell,
    Comparison,
    Dense,
    Refusal,
    compare_criteria,
    comparison_figure,
    csv_text,
    markdown_table,
    print_comparison,
    trained_once,
    write_comparison,
)
from lightning_prune.experiments.comparison.cells import described
from lightning_prune.experiments.comparison.run import weights_digest
from lightning_prune.report.table import MISSING, TIMES
from lightning_prune.tasks import ClassificationTask


class Counting(ClassificationTask):
    """Counts the batches, but for the first, which is traced too, that all its copies train or are scored on."""

    steps = 0

    def training_step(self, batch, batch_idx):
        Counting.steps += batch_idx > 0
        return super().training_step(batch, batch_idx)


class Broken(WeightCriterion):
    """A user's criterion with a mistake in it: no error of ours."""

    def __init__(self):
        self.normalize = self.combine = "mean"

    def channel_scores(self, rows):
        raise RuntimeError("the machine went down")


def task(norm: bool = True, kind: type[ClassificationTask] = ClassificationTask) -> ClassificationTask:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.ReLU(),
        nn.Conv2d(8, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    return kind(net, 10, input_size=(3, 8, 8))


def data() -> DigitsDataModule:
    return DigitsDataModule(batch_size=256, size=8)


def compare(folder: Path, criteria=("l1", "gre"), **options) -> Comparison:
    settings = {"ratios": (0.5, 0.25), "seeds": (0, 1), "epochs": 1, "lr": 0.05, "output": folder, **options}
    Counting.steps = 0
    return compare_criteria(task(kind=Counting), data(), criteria, **settings)


def passes() -> float:
    """Over the training data, of the last comparison."""
    digits = data()
    digits.setup("fit")
    return Counting.steps / (len(digits.train_dataloader()) - 1)


def cells(folder: Path) -> set[Path]:
    return set((folder / "cells").iterdir())


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    folder = tmp_path_factory.mktemp("compare")
    return compare(folder), folder


@pytest.fixture
def outcome(computed, tmp_path: Path) -> tuple[Comparison, Path]:
    """What was computed, and its folder, for this test alone."""
    return computed[0], Path(shutil.copytree(computed[1], tmp_path / "mine"))


def test_every_cell_is_there_once(outcome) -> None:
    comparison, folder = outcome
    found = {(cell.criterion, cell.ratio, cell.seed) for cell in comparison.cells}
    assert found == {(c, r, s) for c in ("l1", "gre") for r in (0.5, 0.25) for s in (0, 1)}
    assert len(comparison.cells) == 8
    assert len(list((folder / "cells").glob("*.json"))) == 8
    assert not comparison.refusals


def test_a_cell_costs_what_its_plan_leaves(outcome) -> None:
    comparison, _ = outcome
    assert comparison.dense.params == sum(p.numel() for p in task().parameters())
    for cell in comparison.cells:
        assert cell.removed == cell.ratio  # 16 channels: 8 or 4 go
        assert cell.macs < comparison.dense.macs
        assert cell.params < comparison.dense.params
        assert 0 <= cell.before <= 1
        assert 0 <= cell.after <= 1
    by = {(c.criterion, c.ratio, c.seed): c for c in comparison.cells}
    assert by["l1", 0.5, 0].before == by["l1", 0.5, 1].before  # weights alone: no seed in it
    assert by["l1", 0.5, 0].macs < by["l1", 0.25, 0].macs


def test_the_task_is_left_as_it_is(tmp_path: Path) -> None:
    dense = task()
    before = weights_digest(dense)
    compare_criteria(dense, data(), ["jre"], ratios=[0.5], seeds=[0], epochs=1, output=tmp_path)
    assert weights_digest(dense) == before
    assert dense.model[0].out_channels == 8


def test_cells_do_not_depend_on_what_ran_before(outcome, tmp_path: Path) -> None:
    comparison, _ = outcome
    alone = compare(tmp_path, ["gre"], ratios=[0.25], seeds=[1]).cells[0]
    assert alone == next(c for c in comparison.cells if (c.criterion, c.ratio, c.seed) == ("gre", 0.25, 1))


def test_a_second_run_computes_nothing(outcome) -> None:
    comparison, folder = outcome
    assert compare(folder) == comparison
    assert passes() == 0


def test_only_what_is_missing_is_computed_and_scored_once(outcome) -> None:
    comparison, folder = outcome
    lost = list((folder / "cells").glob("gre-*-seed1-*.json"))
    assert len(lost) == 2
    for path in lost:
        path.unlink()
    assert compare(folder) == comparison
    assert passes() == 3  # scored once, two ratios fine-tuned


def test_a_run_that_broke_off_goes_on_where_it_stopped(tmp_path: Path) -> None:
    options = {"ratios": [0.5], "seeds": [0]}
    with pytest.raises(RuntimeError, match="went down"):
        compare(tmp_path, {"done": L1(), "later": Broken()}, **options)
    assert passes() == 1  # of L1's fine-tuning
    finished = compare(tmp_path, {"done": L1(), "later": JRE()}, **options)
    assert [cell.criterion for cell in finished.cells] == ["done", "later"]
    assert passes() == 2  # JRE's scores and its fine-tuning


@pytest.mark.parametrize(
    "other",
    [{"epochs": 0}, {"lr": 0.01}, {"selection": "layer"}, {"score_batches": 1}, {"task_settings": "another optimizer"}],
)
def test_cells_of_other_settings_are_not_taken(outcome, other) -> None:
    _, folder = outcome
    before = cells(folder)
    compare(folder, ["l1"], ratios=[0.5], seeds=[0], **other)
    assert len(cells(folder) - before) == 1


def test_cells_of_other_weights_or_data_are_not_taken(outcome) -> None:
    _, folder = outcome
    other = task()
    with torch.no_grad():
        other.model[0].weight[0, 0, 0, 0] += 1
    larger = DigitsDataModule(batch_size=128, size=8)
    settings = {"ratios": [0.5], "seeds": [0], "epochs": 1, "lr": 0.05, "output": folder}
    for start, digits, new in ((task(), data(), 0), (other, data(), 1), (task(), larger, 1)):
        before = cells(folder)
        compare_criteria(start, digits, ["l1"], **settings)
        assert len(cells(folder) - before) == new


def test_a_damaged_cell_is_named(tmp_path: Path) -> None:
    compare(tmp_path, ["l1"], ratios=[0.5], seeds=[0], epochs=0)
    (path,) = (tmp_path / "cells").iterdir()
    path.write_text('{"criterion": "l1"}')
    with pytest.raises(PruningError, match=r"is no cell.*delete it"):
        compare(tmp_path, ["l1"], ratios=[0.5], seeds=[0], epochs=0)


def test_what_cannot_be_scored_is_refused_and_the_others_go_on(tmp_path: Path) -> None:
    known = []
    comparison = compare_criteria(
        task(norm=False), data(), ["bn_scale", "l1"], ratios=[0.5, 0.25], seeds=[0, 1], epochs=0, output=tmp_path,
        on_outcome=known.append,
    )  # fmt: skip
    assert {cell.criterion for cell in comparison.cells} == {"l1"}
    assert [(r.criterion, r.ratio) for r in comparison.refusals] == [("bn_scale", 0.5), ("bn_scale", 0.25)]
    assert len(known) == 6
    text = markdown_table(comparison)
    assert "bn_scale refused at 0.5, 0.25: BNScale needs batch norms" in text
    console = Console(file=io.StringIO(), width=120)
    print_comparison(comparison, console)
    assert "bn_scale refused" in console.file.getvalue()


def test_no_fine_tuning_changes_no_accuracy(tmp_path: Path) -> None:
    (cell,) = compare(tmp_path, ["l1"], ratios=[0.5], seeds=[0], epochs=0).cells
    assert cell.before == cell.after


def test_a_random_criterion_draws_anew_for_every_seed(tmp_path: Path) -> None:
    cells = compare(tmp_path, [Random()], ratios=[0.5], seeds=[0, 1, 2], epochs=0).cells
    assert len({(cell.before, cell.macs) for cell in cells}) > 1


def test_equal_cost_for_all_under_flops(tmp_path: Path) -> None:
    comparison = compare(tmp_path, ["l1", "jre"], ratios=[0.5], seeds=[0], epochs=0, selection="flops")
    assert all(0.3 < cell.macs / comparison.dense.macs <= 0.5 for cell in comparison.cells)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"criteria": ["l1", "magic"]}, r"one of.*jre.*got 'magic'"),
        ({"criteria": []}, "at least one criterion"),
        ({"criteria": [L1(), "l1"]}, "named twice"),
        ({"ratios": [0.5, 0.5]}, "each once"),
        ({"ratios": [0]}, "prunes nothing"),
        ({"ratios": [1.5]}, r"in \[0, 1\)"),
        ({"seeds": [-1]}, "seeds must be"),
        ({"selection": "best"}, "global, layer, flops"),
        ({"epochs": -1}, "epochs must be"),
    ],
)
def test_refused_before_anything_is_run(wrong, says, tmp_path: Path) -> None:
    with pytest.raises((ScoreError, PlanError), match=says):
        compare(tmp_path, **{"criteria": ["l1"], **wrong})
    assert not list(tmp_path.iterdir())


def test_two_forms_of_one_criterion_under_names_of_their_own(tmp_path: Path) -> None:
    forms = {"by layer": JRE(), "by network": JRE(scope="network", spatial="mean")}
    comparison = compare(tmp_path, forms, ratios=[0.5], seeds=[0], epochs=0)
    assert [cell.criterion for cell in comparison.cells] == list(forms)


# --- tables and pictures ---


def made_up(seeds: int = 3) -> Comparison:
    cells = [
        Cell(name, ratio, seed, 0.9 - ratio, accuracy + 0.01 * seed - ratio / 10, int(1e6 * (1 - ratio)), 50_000, ratio)
        for name, accuracy in (("weak", 0.8), ("strong", 0.9))
        for ratio in (0.3, 0.7)
        for seed in range(seeds)
    ]
    return Comparison(Dense(0.95, 1_000_000, 200_000), tuple(cells), (Refusal("odd", 0.3, "no way"),), {"epochs": 2})


def test_rows_are_means_and_sample_deviations_best_first() -> None:
    rows = made_up().rows
    assert [(row.criterion, row.ratio) for row in rows] == [
        ("strong", 0.3), ("weak", 0.3), ("strong", 0.7), ("weak", 0.7)
    ]  # fmt: skip
    assert rows[0].after.mean == pytest.approx(0.88)
    assert rows[0].after.deviation == pytest.approx(0.01)
    assert rows[0].seeds == 3
    assert made_up(1).rows[0].after.deviation is None


def test_csv_has_a_line_per_cell() -> None:
    read = list(csv.DictReader(io.StringIO(csv_text(made_up()))))
    assert len(read) == 12
    assert (read[0]["criterion"], float(read[0]["ratio"]), read[0]["macs"]) == ("weak", 0.3, "700000")


def test_tables_say_the_same_in_markdown_and_in_a_terminal() -> None:
    text = markdown_table(made_up())
    assert f"| strong | 0.7 | 20.00 ± 0.00 | 84.00 ± 1.00 | 0.30 (3.3{TIMES}) | 50.0 (4.0{TIMES}) | 3 |" in text
    assert f"| dense | {MISSING} | 95.00 |" in text
    assert "odd refused at 0.3: no way" in text
    console = Console(file=io.StringIO(), width=80)
    print_comparison(made_up(), console)
    shown = console.file.getvalue()
    assert "84.00 ± 1.00" in shown
    assert "odd refused" in shown


def test_numbers_are_whole_on_80_columns_whatever_the_names() -> None:
    cells = tuple(replace(cell, criterion=f"{cell.criterion}, with a rather long name") for cell in made_up().cells)
    console = Console(file=io.StringIO(), width=80)
    print_comparison(Comparison(made_up().dense, cells, (), {}), console)
    shown = console.file.getvalue()
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown
    assert "84.00 ±1.00" in shown


def test_the_picture_has_a_curve_and_bars_per_criterion_in_both_panels() -> None:
    figure = comparison_figure(made_up())
    before, after = figure.axes
    for axes in (before, after):
        assert [line.get_label() for line in axes.get_lines() if not line.get_label().startswith("_")] == [
            "strong", "weak", "dense"
        ]  # fmt: skip
    strong = next(line for line in after.get_lines() if line.get_label() == "strong")
    assert strong.get_xdata() == pytest.approx([30, 70])
    assert strong.get_ydata() == pytest.approx([84, 88])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["strong", "weak", "dense"]
    with pytest.raises(PruningError, match="nothing to draw"):
        comparison_figure(Comparison(Dense(1, 1, 1), (), (), {}))


def test_what_fell_far_behind_is_named_and_does_not_flatten_the_rest() -> None:
    usual = made_up()
    cells = (*usual.cells, Cell("collapsed", 0.3, 0, 0.1, 0.2, 500_000, 1, 0.3))
    _, after = comparison_figure(Comparison(usual.dense, cells, (), {})).axes
    assert after.get_ylim()[0] > 50
    assert [text.get_text() for text in after.texts] == ["\N{DOWNWARDS ARROW} collapsed 20.0"]
    _, after = comparison_figure(usual).axes
    assert not after.texts


def test_no_name_in_the_legend_is_cut_off() -> None:
    usual = made_up()
    cells = tuple(replace(cell, criterion="random" if cell.criterion == "strong" else "own") for cell in usual.cells)
    for shown in (cells, [replace(cell, criterion=f"{cell.criterion}.MMMMMMMMMMMM") for cell in cells]):
        figure = comparison_figure(Comparison(usual.dense, tuple(shown), (), {}))
        figure.canvas.draw()
        assert figure.legends[0].get_window_extent().x1 <= figure.bbox.x1


def test_files_are_written(tmp_path: Path) -> None:
    files = write_comparison(made_up(), tmp_path / "new")
    assert sorted(path.name for path in files.values()) == ["comparison.csv", "comparison.md", "comparison.png"]
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    (tmp_path / "file").write_text("")
    with pytest.raises(PruningError, match="cannot write"):
        write_comparison(made_up(), tmp_path / "file")


# --- weights ---


def test_trained_once(tmp_path: Path) -> None:
    first, second, other = task(), task(), task()
    assert trained_once(first, data(), 1, tmp_path, task_settings="a")
    assert not trained_once(second, data(), 1, tmp_path, task_settings="a")
    assert weights_digest(first) == weights_digest(second) != weights_digest(task())
    assert trained_once(other, data(), 1, tmp_path, task_settings="b")


# --- the command ---


def tiny_net() -> nn.Module:
    return task().model


def command(folder: Path, *more: str) -> int:
    config = folder / "tiny.yaml"
    config.write_text(
        json.dumps(
            {
                "trainer": {"max_epochs": 1},
                "model": {
                    "class_path": "lightning_prune.tasks.ClassificationTask",
                    "init_args": {"model": {"class_path": f"{__name__}.tiny_net"}, "num_classes": 10,
                                  "input_size": [3, 8, 8]},
                },
                "data": {"class_path": "lightning_prune.data.DigitsDataModule",
                         "init_args": {"size": 8, "batch_size": 256}},
            }
        )
    )  # fmt: skip
    return main(["compare", "--config", str(config), "--out", str(folder / "out"), *more])


def test_command_trains_once_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--criteria", "l1,gre", "--ratios", "0.5", "--seeds", "0,1", "--epochs", "0")
    assert command(tmp_path, *options) == 0
    first = capsys.readouterr().out
    assert "trained" in first
    files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.json")}
    assert len(files) == 4
    assert command(tmp_path, *options) == 0
    assert "not trained again" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.json")} == files
    (checkpoint,) = (tmp_path / "out").glob("dense-*.ckpt")
    assert command(tmp_path, *options, "--checkpoint", str(checkpoint)) == 0
    assert len(list((tmp_path / "out").rglob("*.json"))) == 4  # the same weights, hence the same cells
    assert (tmp_path / "out" / "comparison.csv").read_text().count("\n") == 5


def test_command_names_valid_criteria_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command(tmp_path, "--criteria", "l1,nonsense")
    assert stop.value.code == 2
    assert "next_layer_taylor" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_command_refuses_a_bad_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command(tmp_path, "--ratios", "0.5,half")
    assert stop.value.code == 2
    assert "--ratios" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(Counting, "steps", 0)
    dense = task(kind=Counting)
    with pytest.raises(PruningError, match="cannot write"):
        trained_once(dense, data(), 1, tmp_path / "file", {})
    with pytest.raises(PruningError, match="cannot write"):
        compare_criteria(dense, data(), ["taylor"], ratios=[0.5], seeds=[0], output=tmp_path / "file" / "in")
    assert Counting.steps == 0


def test_cells_of_a_criterion_whose_code_has_changed_are_not_taken(tmp_path: Path, monkeypatch) -> None:
    assert described(L1()) == repr(L1())
    code = """
from lightning_prune.criteria import L1 as Base

class L1(Base):
    def channel_scores(self, rows):
        return {sign}rows.abs().sum(1)
"""
    monkeypatch.syspath_prepend(tmp_path)
    said = []
    for sign in ("", "-"):
        (tmp_path / "mine_of_test.py").write_text(code.format(sign=sign))
        linecache.clearcache()
        module = importlib.import_module("mine_of_test")
        said.append(described(module.L1()))
    assert len({*said, repr(L1())}) == 3
