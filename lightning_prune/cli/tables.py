"""Tables and lines that read the same in a terminal of 80 columns, in a wide one, and in an ASCII log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_prune.report.table import IN_ASCII

ROOMY = 100


class Head(NamedTuple):
    """A column: its title (a second line holds the unit), and whether only wide terminals show it."""

    title: str
    roomy: bool = False
    justify: Literal["left", "right"] = "right"


def shown(console: Console, text: str, style: str = "") -> Text:
    """Text that the console's encoding can hold: a log file may be ASCII, where × would end the run."""
    if not console.encoding.lower().startswith("utf"):
        for sign, word in IN_ASCII.items():
            text = text.replace(sign, word)
        text = text.encode("ascii", "replace").decode()
    return Text(text, style)


def print_table(console: Console, heads: Sequence[Head], rows: Sequence[Sequence[str]], last: str = "") -> None:
    """Print rows under their heads, the first column to the left; columns for wide terminals are left out of others.

    Args:
        console: where to.
        heads: one per column.
        rows: one text per column.
        last: style of the last row.
    """
    ascii_only = not console.encoding.lower().startswith("utf")
    rule = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True) if ascii_only else box.SIMPLE_HEAD
    wide = console.width >= ROOMY
    table = Table(box=rule, show_edge=False, padding=(0, 1) if wide else (0, 0), pad_edge=False)
    columns = [number for number, head in enumerate(heads) if wide or not head.roomy]
    for number in columns:
        head = heads[number]
        first = number == 0
        table.add_column(
            shown(console, head.title),
            justify="left" if first else head.justify,
            no_wrap=True,
            overflow="ellipsis" if first and not ascii_only else "crop",
        )
    for place, row in enumerate(rows):
        style = last if place == len(rows) - 1 else ""
        table.add_row(*(shown(console, row[number], style) for number in columns))
    console.print(table)


def print_line(console: Console, text: str, style: str = "", indent: str = "") -> None:
    """Print a sentence, wrapped at words; further lines are indented."""
    lines = shown(console, text, style).wrap(console, console.width - len(indent))
    for number, line in enumerate(lines):
        console.print(Text(indent if number else "") + line)
