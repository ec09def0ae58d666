"""`reproduce`: a published table or figure, with ours beside it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_prune.experiments.reproduce import (
    Cell,
    Refused,
    print_page,
    read_recipe,
    recipe_names,
    reproduce,
    write_page,
)
from lightning_prune.report.table import Column, Table, print_line

PROGRESS = ("epoch", "train_loss", "val_loss", "accuracy", "train_seconds", "left", "before", "after")  # of a training


def run(options: argparse.Namespace) -> int:
    """`lightning-prune reproduce lr-table2 --scale smoke --out runs/lr-table2`."""
    console = Console(highlight=False)
    if options.name is None:
        _list(console)
        return 0
    recipe = read_recipe(options.name)
    output = options.output or Path("runs/reproduce") / f"{recipe.name}-{options.scale}"
    scale = recipe.scale(options.scale)
    print_line(console, f"{recipe.item}: {recipe.title}", "bold")
    print_line(console, f"{scale.about} {scale.cost}", "dim")

    def show(outcome: Cell | Refused) -> None:
        if isinstance(outcome, Refused):
            print_line(console, f"{outcome.row}, seed {outcome.seed}: {outcome.reason}", "yellow", indent="  ")
            return
        numbers = {name: outcome.values.get(name) for name in (*recipe.columns, *recipe.metrics)}
        said = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items() if value is not None)
        print_line(console, f"{outcome.row}, seed {outcome.seed}: {said} ({outcome.seconds:.0f} s)", indent="  ")

    def tell(name: str, values: dict[str, Any]) -> None:
        said = ", ".join(f"{key} {values[key]:.4g}" for key in PROGRESS if values.get(key) is not None)
        print_line(console, f"{name}: {said}", "dim", indent="    ")

    found = reproduce(
        recipe,
        options.scale,
        output,
        data=options.data,
        seeds=options.seeds,
        precision=options.precision,
        only=options.only,
        progress=console.is_terminal,
        on_progress=None if console.is_terminal else tell,  # there are bars
        on_outcome=show,
    )
    files = write_page(found, output)
    console.print()
    print_page(found, console)
    console.print("\nWritten: " + "  ".join(map(str, files.values())), soft_wrap=True)
    if not found.complete:
        raise KeyboardInterrupt
    return 0 if found.cells else 1


def _list(console: Console) -> None:
    recipes = [read_recipe(name) for name in recipe_names()]
    columns = Column("name"), Column("of", left=True), Column("what", left=True)
    for paper in dict.fromkeys(recipe.paper for recipe in recipes):
        rows = [(recipe.name, recipe.item, recipe.title) for recipe in recipes if recipe.paper == paper]
        print_line(console, paper, "bold")
        console.print(Table(columns, tuple(rows)))
        console.print()
    print_line(console, "lightning-prune reproduce lr-table2 --scale smoke --out runs/lr-table2")
