"""A comparison as a table in the terminal, in Markdown, and as CSV with a line per cell."""

from __future__ import annotations

from dataclasses import astuple, fields
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_prune.experiments.comparison.cells import Cell, Comparison, Spread
from lightning_prune.experiments.comparison.picture import comparison_figure
from lightning_prune.files import write_text
from lightning_prune.report.figures import save_figure
from lightning_prune.report.table import MISSING, TIMES, Column, Entry, Table, print_line

if TYPE_CHECKING:
    from rich.console import Console


def csv_text(comparison: Comparison) -> str:
    """One line per cell, after a line of column names; accuracies in [0, 1]."""
    return Table.of([field.name for field in fields(Cell)], map(astuple, comparison.cells)).csv()


def comparison_table(comparison: Comparison) -> Table:
    """The dense model's row, then one per criterion and ratio; the most accurate of every ratio stands first."""
    dense, metric, rows = comparison.dense, comparison.metric, comparison.rows
    columns = (
        *(Column("criterion"), Column("ratio"), Column(f"{metric}\nbefore", "%"), Column(f"{metric}\nafter", "%")),
        *(Column("MACs", "M"), Column("parameters", "k"), Column("seeds")),
    )
    costs = f"{dense.macs / 1e6:.2f}", f"{dense.params / 1e3:.1f}"
    lines: list[tuple[str | Entry, ...]] = [("dense", MISSING, f"{100 * dense.accuracy:.2f}", MISSING, *costs, MISSING)]
    for row in rows:
        macs = Entry(f"{row.macs.mean / 1e6:.2f}", times=f"{dense.macs / row.macs.mean:.1f}{TIMES}")
        params = Entry(f"{row.params.mean / 1e3:.1f}", times=f"{dense.params / row.params.mean:.1f}{TIMES}")
        accuracies = _percent(row.before), _percent(row.after)
        lines.append((row.criterion, f"{row.ratio:g}", *accuracies, macs, params, str(row.seeds)))
    ratios = [None, *(row.ratio for row in rows), None]
    return Table(
        columns,
        tuple(lines),
        {n: "key" for n in range(len(rows) + 1) if not n or ratios[n] != ratios[n - 1]},
        frozenset(n for n in range(len(rows)) if ratios[n] != ratios[n + 1]),
    )


def markdown_table(comparison: Comparison) -> str:
    """The table in Markdown, with what was refused and how to read it."""
    refused = "\n".join(f"- {text}" for text in refusals(comparison))
    parts = comparison_table(comparison).markdown(), refused, f"<sub>{footnote(comparison)}</sub>\n"
    return "\n\n".join(filter(None, parts))


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
    kinds = ("csv", "md", "png") if comparison.cells else ("csv", "md")
    files = {kind: Path(folder) / f"comparison.{kind}" for kind in kinds}
    for kind, text in (("csv", csv_text(comparison)), ("md", markdown_table(comparison))):
        write_text(files[kind], text)
    if comparison.cells:
        save_figure(comparison_figure(comparison), files["png"])
    return files


def _percent(spread: Spread) -> Entry:
    return Entry(f"{100 * spread.mean:.2f}", "" if spread.deviation is None else f"{100 * spread.deviation:.2f}")
