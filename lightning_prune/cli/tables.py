"""Tables and lines that read the same in a terminal of 80 columns, in a wide one, and in an ASCII log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_prune.report.figures import shorten
from lightning_prune.report.table import head_rule, is_ascii, printable


class Head(NamedTuple):
    """A column: its title (a second line holds the unit), and whether it goes where the terminal is too narrow."""

    title: str
    optional: bool = False


def print_table(console: Console, heads: Sequence[Head], rows: Sequence[Sequence[str]], last: str = "") -> None:
    """Print rows under their heads, the first column to the left.

    What does not fit goes in this order: the padding, the optional columns from the right, the beginnings of long
    module paths in the first column.

    Args:
        console: where to.
        heads: one per column.
        rows: one text per column.
        last: style of the last row.
    """
    columns = list(range(len(heads)))
    table = _table(console, heads, rows, columns, last, padding=1)
    unlimited = console.options.update(width=10_000)
    while console.measure(table, options=unlimited).maximum > console.width:
        table = _table(console, heads, rows, columns, last, padding=0)
        if console.measure(table, options=unlimited).maximum <= console.width:
            break
        optional = [number for number in columns if heads[number].optional]
        if not optional:
            excess = console.measure(table, options=unlimited).maximum - console.width
            rows = _shortened(rows, excess + (2 if is_ascii(console) else 0))
            table = _table(console, heads, rows, columns, last, padding=0)
            break
        columns.remove(optional[-1])
    console.print(table)


def _shortened(rows: Sequence[Sequence[str]], excess: int) -> list[list[str]]:
    """Rows whose module paths are that much shorter than the longest; texts of several words are wrapped instead."""
    limit = max(max(len(row[0]) for row in rows) - excess, 12)
    return [[row[0] if " " in row[0] else shorten(row[0], limit), *row[1:]] for row in rows]


def _table(
    console: Console,
    heads: Sequence[Head],
    rows: Sequence[Sequence[str]],
    columns: Sequence[int],
    last: str,
    padding: int,
) -> Table:
    table = Table(box=head_rule(console), show_edge=False, padding=(0, padding), pad_edge=False)
    for number in columns:
        first = number == 0
        title = printable(console, heads[number].title)
        table.add_column(title, justify="left" if first else "right", no_wrap=not first, overflow="fold")
    for place, row in enumerate(rows):
        style = last if place == len(rows) - 1 else ""
        table.add_row(*(printable(console, row[number], style) for number in columns))
    return table


def print_line(console: Console, text: str, style: str = "", indent: str = "") -> None:
    """Print a sentence, wrapped at words; further lines are indented."""
    lines = printable(console, text, style).wrap(console, console.width - len(indent))
    for number, line in enumerate(lines):
        console.print(Text(indent if number else "") + line)
