"""The page: ours beside the published, what was left out or refused, in a terminal of 80 columns, Markdown and HTML."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from lightning_prune.experiments.reproduce import Cell, Refused, Reproduction, markdown, print_page, write_page
from lightning_prune.experiments.reproduce.page import agreement, costs_table, html, results_table
from lightning_prune.experiments.reproduce.pictures import PICTURES, pictures
from lightning_prune.experiments.reproduce.recipe import read_recipe
from lightning_prune.report.summary import MINUS
from lightning_prune.report.table import MISSING
from tests.experiments.reproduce.tiny import recipe


def made_up(changes: dict | None = None, seeds: int = 2) -> Reproduction:
    """A dense and one pruned row from some seeds; the third row was not run."""
    settings = recipe(changes)
    cells = []
    for seed in range(seeds):
        curve = [
            {"epoch": e, "train_loss": 1 / (e + 1), "val_loss": 1.2 / (e + 1), "accuracy": 0.5 + 0.1 * e,
             "elapsed_seconds": 3.0 * e + 2}
            for e in range(3)
        ]  # fmt: skip
        roc = {"fpr": [[0, 0.1, 1]] * 10, "tpr": [[0, 0.9, 1]] * 10, "auc": [0.9] * 10}
        more = {
            "roc": roc,
            "classes": list("0123456789"),
            "image": [[[0.1, 0.9], [0.3, 0.5]]] * 3,
            "maps": [
                {"channel": c, "fate": fate, "score": c / 10, "map": [[0.0, 1.0], [c, 2.0]]}
                for c, fate in ((1, "removed"), (2, "removed"), (8, "kept"))
            ],
            "rounds": [{"share": s, "before": s - 10, "after": s} for s in (75.0, 50.0, 25.0)],
        }
        dense = {"left": 100.0, "params_left": 100.0, "acc": 90.0 + seed}
        pruned = {"left": 45.0, "params_left": 50.0, "acc": 89.0 + seed, "change": -1.0}
        cells += [Cell("net", seed, dense, curve, more, 2.0), Cell("net L1 .5", seed, pruned, curve, more, 3.0)]
    costs = [
        Cell("net", 0, {"flops": 0.66, "params": 0.0053, "flops_spread": 0.0, "params_spread": 0.0}),
        Cell("net GM .5", 0, {"flops": 0.3333, "params": 0.003, "flops_spread": 0.01, "params_spread": 0.0}),
    ]
    scale = replace(settings.scale("smoke"), seeds=tuple(range(seeds)))
    rows = list(settings.rows[:2])
    found = Reproduction(settings, "smoke", scale, rows, costs, sorted(cells, key=lambda c: c.row), complete=True)
    found.refused.append(Refused("net GM .5", 0, "no\nway"))
    return found


def shown(found: Reproduction, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_page(found, console)
    return console.file.getvalue()


def test_the_table_has_ours_beside_the_published_column_by_column() -> None:
    table = results_table(made_up())
    assert table.headings[1:5] == [
        "FLOPs left paper (%)", "FLOPs left ours (%)", "params left paper (%)", "params left ours (%)"
    ]  # fmt: skip
    row = [str(entry) for entry in table.rows[1]]
    assert row == [
        "net L1 .5", "50.0", "45.0 ± 0.0", "50.0", "50.0 ± 0.0", "88.00", "89.50 ± 0.71", f"{MINUS}2.00",
        f"{MINUS}1.00 ± 0.00",
    ]  # fmt: skip
    assert [str(entry) for entry in table.rows[2][1:]] == [
        "50.0", MISSING, MISSING, MISSING, "87.00", MISSING, f"{MINUS}3.00", MISSING
    ]  # fmt: skip
    assert table.looks == {0: "key", 2: "quiet"}


def test_a_column_that_only_one_side_has_is_one_column() -> None:
    found = made_up()
    found.recipe = replace(found.recipe, columns={"acc": "accuracy, %", "time": "seconds"})
    assert results_table(found).headings[1:] == ["accuracy paper (%)", "accuracy ours (%)"]
    found.cells[0].values["time"] = 3.0
    assert results_table(found).headings[3:] == ["seconds ours"]


def test_a_wide_table_has_a_line_for_each_side() -> None:
    found = made_up({"stacked": True})
    table = results_table(found)
    assert table.headings == ["", "", "FLOPs left (%)", "params left (%)", "accuracy (%)", "change"]
    lines = [[str(entry) for entry in row] for row in table.rows]
    assert lines[:4] == [
        ["net", "paper", MISSING, MISSING, "90.00", MISSING],
        ["", "ours", "100.0 ± 0.0", "100.0 ± 0.0", "90.50 ± 0.71", MISSING],
        ["net L1 .5", "paper", "50.0", "50.0", "88.00", f"{MINUS}2.00"],
        ["", "ours", "45.0 ± 0.0", "50.0 ± 0.0", "89.50 ± 0.71", f"{MINUS}1.00 ± 0.00"],
    ]
    assert [line[:2] for line in lines[4:]] == [["net GM .5", "paper"]]  # not run


def test_one_seed_has_no_spread() -> None:
    assert str(results_table(made_up(seeds=1)).rows[1][6]) == "89.00"
    assert "one seed" in markdown(made_up(seeds=1))


def test_costs_stand_beside_the_print_with_the_difference() -> None:
    found = made_up()
    rows = [[str(entry) for entry in row] for row in costs_table(found).rows]
    assert rows[0] == ["net", "0.66", "0.66", "±0.00", "0.0053", "0.0053", "±0.00"]
    assert rows[1] == ["net GM .5", "0.33", "0.33 ± 0.01", "+1.00", MISSING, "0.0030", MISSING]
    assert agreement(found) == (
        "Dense models differ from the print by at most 0.000%; "
        "random masks and their union by at most 1.00% (net GM .5)."
    )


def test_latency_of_the_published_network_stands_beside_its_costs() -> None:
    found = made_up()
    found.costs[0].values["latency"] = 5.4321
    row = [str(entry) for entry in costs_table(found).rows[0]]
    assert row[-1] == "5.43"  # as many digits as are printed, or two
    assert costs_table(found).headings[-1] == "latency ours (ms)"


def test_the_page_says_everything_in_every_form() -> None:
    found = made_up()
    for text in (markdown(found), html(found), shown(found)):
        for said in ("Table 1", "A. Author, 2020", "89.50", "What is published is made up.", "Half of its width",
                     "net GM .5, seed 0: no way", "10 s for all that is shown", "2 seeds"):  # fmt: skip
            assert said in " ".join(text.split()), said
    assert "interrupted" not in markdown(found)
    found.complete = False
    assert "The run was interrupted; the same command goes on from here." in markdown(found)


def test_it_fits_a_terminal_of_80_columns() -> None:
    lines = shown(made_up()).splitlines()
    assert max(map(len, lines)) <= 80
    assert any("89.50 ±0.71" in line for line in lines)


@pytest.mark.parametrize("name", ["lr-table2", "lr-table3", "lr-table5", "lr-table7", "guo-lenet", "jre-figure2"])
def test_the_shipped_tables_fit_80_columns_and_lose_no_number(name: str) -> None:
    settings = read_recipe(name)
    values = {**dict.fromkeys(settings.columns, 12.345)}
    cells = [Cell(row.label, 0, values) for row in settings.rows]
    found = Reproduction(settings, "smoke", settings.scale("smoke"), list(settings.rows), [], cells, complete=True)
    text = shown(found)
    assert max(map(len, text.splitlines())) <= 80
    assert "\N{HORIZONTAL ELLIPSIS}" not in text


def test_all_pictures_are_drawn_and_written(tmp_path: Path) -> None:
    found = made_up({"pictures": list(PICTURES)})
    files = write_page(found, tmp_path)
    assert set(files) == {"md", "html", *PICTURES}
    for name in PICTURES:
        assert files[name].read_bytes().startswith(b"\x89PNG")
        assert f"]({name}.png)" in files["md"].read_text(encoding="utf-8")
    assert files["html"].read_text(encoding="utf-8").count("<img") == len(PICTURES)


def test_a_picture_with_nothing_to_draw_is_left_out() -> None:
    found = made_up({"pictures": list(PICTURES)})
    found.cells = [replace(cell, curve=[], more={}) for cell in found.cells]
    assert [picture.name for picture in pictures(found)] == ["tradeoff"]
    found.cells = []
    assert not list(pictures(found))


def test_the_tradeoff_has_ours_filled_and_theirs_hollow() -> None:
    found = made_up({"pictures": ["tradeoff"]})
    (axes,) = next(iter(pictures(found))).draw().axes
    points = {(line.get_xdata()[0], line.get_ydata()[0]): line.get_markerfacecolor() for line in axes.get_lines()}
    assert points[45.0, -1.0] != "none"
    assert points[50.0, -2.0] == "none"
    assert points[50.0, -3.0] == "none"


def test_a_loss_that_is_far_off_does_not_flatten_the_rest() -> None:
    found = made_up({"pictures": ["losses"]}, seeds=1)
    assert {axes.get_yscale() for axes in next(iter(pictures(found))).draw().axes} == {"linear"}
    found.cells[0].curve[0]["val_loss"] = 900.0
    scales = {axes.get_title(loc="left"): axes.get_yscale() for axes in next(iter(pictures(found))).draw().axes}
    assert scales["net"] == "log"


def test_orders_are_drawn_a_panel_per_ratio() -> None:
    rows = [
        {"label": "net", "model": "net"},
        {"label": "net L1 .5", "model": "net", "criterion": "l1", "order": "B"},
    ]
    found = made_up({"pictures": ["orders"], "rows": rows})
    figure = next(iter(pictures(found))).draw()
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["50% of every layer removed"]
    (line,) = figure.axes[0].get_lines()
    assert line.get_label() == "order B: 8 s"
    assert line.get_ydata() == pytest.approx([50, 60, 70])
