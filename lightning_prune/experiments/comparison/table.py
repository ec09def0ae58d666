"""A comparison as a table in the terminal, in Markdown, and as CSV with a line per cell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, fields
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_prune.experiments.comparison.cells import Cell, Comparison, Dense, Row, Spread
from lightning_prune.experiments.comparison.picture import comparison_figure
from lightning_prune.files import atomic
from lightning_prune.report.figures import save_figure
from lightning_prune.report.table import MISSING, TIMES, Column, Entry, Table, print_line

if TYPE_CHECKING:
    from rich.console import Console


def csv_text(comparison: Comparison) -> str:
    """One line per cell, after a line of column names; accuracies in [0, 1]."""
    return Table.of([field.name for field in fields(Cell)], map(astuple, comparison.cells)).csv()


def comparison_table(comparison: Comparison) -> Table:
    """The dense model's row, then one per criterion and ratio; the most accurate of every ratio stands first.

    Example:
        >>> from lightning_prune.experiments.comparison import Dense
        >>> cells = tuple(Cell("l1", 0.5, seed, 0.5, 0.9 + 0.02 * seed, 500, 90, 0.5) for seed in (0, 1))
        >>> print(comparison_table(Comparison(Dense(0.95, 1000, 200), cells, (), {})).markdown().splitlines()[3])
        | l1 | 0.5 | 50.00 ± 0.00 | 91.00 ± 1.41 | 0.00 (2.0×) | 0.1 (2.2×) | 2 |
    """
    dense, metric, rows = comparison.dense, comparison.metric, comparison.rows
    columns = (
        *(Column("criterion"), Column("ratio"), Column(f"{metric}\nbefore", "%"), Column(f"{metric}\nafter", "%")),
        *(Column("MACs", "M"), Column("parameters", "k"), Column("seeds")),
    )
    costs = f"{dense.macs / 1e6:.2f}", f"{dense.params / 1e3:.1f}"
    first = ("dense", MISSING, f"{100 * dense.accuracy:.2f}", MISSING, *costs, MISSING)
    ratios = [None, *(row.ratio for row in rows), None]
    return Table(
        columns,
        (first, *(_line(row, dense) for row in rows)),
        {n: "key" for n in range(len(rows) + 1) if not n or ratios[n] != ratios[n - 1]},
        frozenset(n for n in range(len(rows)) if ratios[n] != ratios[n + 1]),
    )


def markdown_table(comparison: Comparison) -> str:
    """The table in Markdown, with what was refused and how to read it."""
    refused = [f"- {text}" for text in refusals(comparison)]
    lines = [comparison_table(comparison).markdown(), "", *refused, *([""] if refused else [])]
    return "\n".join([*lines, f"<sub>{footnote(comparison)}</sub>", ""])


def refusals(comparison: Comparison) -> list[str]:
    """What could not be done, a line per criterion and reason."""
    by_reason: dict[tuple[str, str], list[float]] = {}
    for refusal in comparison.refusals:
        by_reason.setdefault((refusal.criterion, refusal.reason), []).append(refusal.ratio)
    return [
        f"{criterion} refused at {', '.join(f'{ratio:g}' for ratio in ratios)}: {' '.join(reason.split())}"
        for (criterion, reason), ratios in by_reason.items()
    ]


def footnote(comparison: Comparison) -> str:
    """How to read the table."""
    epochs = comparison.settings.get("epochs", 0)
    return (
        f"mean ± standard deviation over seeds; {TIMES}: times less than dense; before and after {epochs} "
        f"epoch{'' if epochs == 1 else 's'} of fine-tuning; MACs per sample"
    )


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print the table, what was refused and how to read it; to the terminal by default."""
    from rich.console import Console

    console = console or Console()
    console.print(comparison_table(comparison))
    for text in refusals(comparison):
        print_line(console, text, "yellow")
    print_line(console, footnote(comparison), "dim")


def write_comparison(comparison: Comparison, folder: str | Path) -> dict[str, Path]:
    """Write ``comparison.csv``, ``.md`` and ``.png`` (none without a cell), each as a whole or not at all.

    Raises:
        PruningError: a file cannot be written.
    """
    writers: dict[str, Callable[[Comparison], str]] = {"csv": csv_text, "md": markdown_table}
    files = {kind: Path(folder) / f"comparison.{kind}" for kind in (*writers, *(["png"] if comparison.cells else []))}
    for kind, write in writers.items():
        with atomic(files[kind]) as stream:
            stream.write(write(comparison).encode())
    if "png" in files:
        save_figure(comparison_figure(comparison), files["png"])
    return files


def _line(row: Row, dense: Dense) -> tuple[str | Entry, ...]:
    return (
        row.criterion,
        f"{row.ratio:g}",
        _percent(row.before),
        _percent(row.after),
        Entry(f"{row.macs.mean / 1e6:.2f}", times=f"{dense.macs / row.macs.mean:.1f}{TIMES}"),
        Entry(f"{row.params.mean / 1e3:.1f}", times=f"{dense.params / row.params.mean:.1f}{TIMES}"),
        str(row.seeds),
    )


def _percent(spread: Spread) -> Entry:
    return Entry(f"{100 * spread.mean:.2f}", "" if spread.deviation is None else f"{100 * spread.deviation:.2f}")
