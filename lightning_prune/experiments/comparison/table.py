"""A comparison as a table in the terminal, in Markdown, and as CSV with a line per cell."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_prune.errors import PruningError
from lightning_prune.experiments.comparison.cells import Cell, Comparison, Row, Spread
from lightning_prune.experiments.comparison.picture import comparison_figure
from lightning_prune.files import atomic
from lightning_prune.report.figures import save_figure
from lightning_prune.report.table import MISSING, TIMES, is_ascii, printable

if TYPE_CHECKING:
    from rich.console import Console


def csv_text(comparison: Comparison) -> str:
    """One line per cell, after a line of column names; accuracies in [0, 1]."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [field.name for field in fields(Cell)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(cell) for cell in comparison.cells)
    return stream.getvalue()


def heads(comparison: Comparison) -> tuple[str, ...]:
    """Column titles."""
    metric = comparison.metric
    return ("criterion", "ratio", f"{metric} before %", f"{metric} after %", "MACs M", "parameters k", "seeds")


def lines(comparison: Comparison) -> list[tuple[str, ...]]:
    """The dense model's line, then one per row."""
    dense = comparison.dense
    first = ("dense", MISSING, f"{100 * dense.accuracy:.2f}", MISSING, f"{dense.macs / 1e6:.2f}")
    return [(*first, f"{dense.params / 1e3:.1f}", MISSING), *(_line(row, comparison) for row in comparison.rows)]


def markdown_table(comparison: Comparison) -> str:
    """The table in Markdown, with what was refused and how to read it.

    Example:
        >>> from lightning_prune.experiments.comparison import Dense
        >>> cells = tuple(Cell("l1", 0.5, seed, 0.5, 0.9 + 0.02 * seed, 500, 90, 0.5) for seed in (0, 1))
        >>> print(markdown_table(Comparison(Dense(0.95, 1000, 200), cells, (), {})).splitlines()[3])
        | l1 | 0.5 | 50.00 ± 0.00 | 91.00 ± 1.41 | 0.00 (2.0×) | 0.1 (2.2×) | 2 |
    """
    columns = heads(comparison)
    table = ["| " + " | ".join(columns) + " |", "| --- |" + " ---: |" * (len(columns) - 1)]
    table += ["| " + " | ".join(line) + " |" for line in lines(comparison)]
    refused = [f"- {text}" for text in refusals(comparison)]
    return "\n".join([*table, "", *refused, *([""] if refused else []), f"<sub>{footnote(comparison)}</sub>", ""])


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
    """Print the table; the most accurate of every ratio stands first.

    Args:
        comparison: what was measured.
        console: where to; the terminal by default.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    shown = partial(printable, console)
    table = Table(
        box=box.ASCII2 if is_ascii(console) else box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True
    )
    for number, title in enumerate(heads(comparison)):
        kind: dict[str, Any] = {"justify": "right", "no_wrap": True} if number else {"overflow": "fold"}
        table.add_column(shown(title.replace(" ", "\n")), **kind)
    for _, block in groupby(lines(comparison), key=lambda line: line[1]):
        for rank, line in enumerate(block):
            table.add_row(*(shown(cell, "bold" if rank == 0 else "") for cell in line))
        table.add_section()
    console.print(table)
    for text in refusals(comparison):
        console.print(shown(text, "yellow"))
    console.print(shown(footnote(comparison), "dim"))


def write_comparison(comparison: Comparison, folder: str | Path) -> dict[str, Path]:
    """Write ``comparison.csv``, ``.md`` and ``.png`` (none without a cell), each as a whole or not at all.

    Raises:
        PruningError: a file cannot be written.
    """
    writers: dict[str, Callable[[Comparison], str]] = {"csv": csv_text, "md": markdown_table}
    files = {kind: Path(folder) / f"comparison.{kind}" for kind in (*writers, *(["png"] if comparison.cells else []))}
    try:
        for kind, path in files.items():
            if kind == "png":
                save_figure(comparison_figure(comparison), path)
                continue
            with atomic(path) as stream:
                stream.write(writers[kind](comparison).encode())
    except OSError as error:
        raise PruningError(f"cannot write to {folder}: {error.strerror or error}") from error
    return files


def _line(row: Row, comparison: Comparison) -> tuple[str, ...]:
    dense = comparison.dense
    return (
        row.criterion,
        f"{row.ratio:g}",
        _percent(row.before),
        _percent(row.after),
        f"{row.macs.mean / 1e6:.2f} ({dense.macs / row.macs.mean:.1f}{TIMES})",
        f"{row.params.mean / 1e3:.1f} ({dense.params / row.params.mean:.1f}{TIMES})",
        str(row.seeds),
    )


def _percent(spread: Spread) -> str:
    deviation = "" if spread.deviation is None else f" ± {100 * spread.deviation:.2f}"
    return f"{100 * spread.mean:.2f}{deviation}"
