"""One table for every reader: a terminal, Markdown, CSV, HTML."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from lightning_prune.report.pages import render

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.table import Table as RichTable
    from rich.text import Text

MISSING = "\u2013"  # what was not measured
TIMES = "\u00d7"
IN_ASCII = str.maketrans({TIMES: "x", "±": "+-", "\u2212": "-", MISSING: "-", "→": "->", "µ": "u", "…": "..."})
IN_MARKDOWN = str.maketrans({"|": "\\|", "\n": " "})
Look = Literal["key", "quiet"]  # of a row: it stands out, or stays back
STYLES = {"key": "bold", "quiet": "dim"}


@dataclass(frozen=True)
class Entry:
    """A number or a word, and what stands small beside it.

    Attributes:
        value: the text itself.
        spread: half the width of what was measured.
        times: ratio to another row.
        more: what a page shows when asked for it.

    Example:
        >>> str(Entry("4.93", "0.11", "2.5×"))
        '4.93 ± 0.11 (2.5×)'
    """

    value: str
    spread: str = ""
    times: str = ""
    more: str = ""

    def __str__(self) -> str:
        spread = f" ± {self.spread}" if self.spread else ""
        return f"{self.value}{spread} ({self.times})" if self.times else f"{self.value}{spread}"


@dataclass(frozen=True)
class Column:
    """One quantity over all rows.

    Attributes:
        title: a terminal breaks it at its line breaks.
        unit: below it, or in brackets behind it.
        left: text that may be wrapped; numbers stand to the right.
        optional: left out where a terminal is too narrow.
    """

    title: str
    unit: str = ""
    left: bool = False
    optional: bool = False

    @property
    def heading(self) -> str:
        """Title and unit in one line."""
        return " ".join(self.title.split()) + (f" ({self.unit})" if self.unit else "")


@dataclass(frozen=True)
class Table:
    """Columns, and rows of numbers, texts and entries; the first column names the rows.

    Printed with rich's ``console.print``, it fits the terminal. What gives way, in this order: the space between
    columns, what stands beside a number, optional columns from the right, the beginnings of long module paths.

    Attributes:
        columns: one per place in a row.
        rows: from top to bottom.
        looks: of rows, by their numbers.
        gaps: numbers of the rows that a terminal puts an empty line below.

    Example:
        >>> table = Table.of(("layer", "kept"), [("conv1", 3)])
        >>> print(table.markdown())
        | layer | kept |
        | --- | ---: |
        | conv1 | 3 |
        >>> table.csv().splitlines()
        ['layer,kept', 'conv1,3']
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]
    looks: Mapping[int, Look] = field(default_factory=dict)
    gaps: frozenset[int] = frozenset()

    @classmethod
    def of(cls, titles: Iterable[str], rows: Iterable[tuple[Any, ...]]) -> Table:
        """A table whose columns have a title and nothing else."""
        return cls(tuple(map(Column, titles)), tuple(rows))

    @property
    def headings(self) -> list[str]:
        """Title and unit of every column."""
        return [column.heading for column in self.columns]

    @property
    def data(self) -> list[list[Any]]:
        """Rows of numbers and texts."""
        return [[str(entry) if isinstance(entry, Entry) else entry for entry in row] for row in self.rows]

    def markdown(self) -> str:
        """The table for a README."""
        rule = ["---:" if number and not column.left else "---" for number, column in enumerate(self.columns)]
        lines = (map(str, line) for line in (self.headings, rule, *self.data))
        return "\n".join(f"| {' | '.join(entry.translate(IN_MARKDOWN) for entry in line)} |" for line in lines)

    def csv(self) -> str:
        """The table for other programs."""
        stream = io.StringIO(newline="")
        csv.writer(stream, lineterminator="\n").writerows([self.headings, *self.data])
        return stream.getvalue()

    def html(self, kind: str = "") -> str:
        """The table for a page; ``kind`` is its class in the style sheet."""
        return render("table.html", table=self, kind=kind)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RichTable]:
        unlimited = options.update(width=10_000)
        for drawn in self._narrower(console, options.max_width):
            if console.measure(drawn, options=unlimited).maximum <= options.max_width:
                break
        yield drawn

    def _narrower(self, console: Console, width: int) -> Iterator[RichTable]:
        """The same table, taking less room every time."""
        table = self
        yield table._drawn(console, padding=1)
        yield table._drawn(console)
        yield (drawn := table._drawn(console, tight=True))
        for gone in reversed([number for number, column in enumerate(self.columns) if column.optional]):
            columns, *rows = ((*line[:gone], *line[gone + 1 :]) for line in (table.columns, *table.rows))
            table = replace(table, columns=columns, rows=tuple(rows))
            yield (drawn := table._drawn(console, tight=True))
        excess = console.measure(drawn, options=console.options.update(width=10_000)).maximum - width
        longest = max((len(str(row[0])) for row in table.rows), default=0)
        limit = max(longest - excess - (2 if console.options.ascii_only else 0), 12)
        names = [name if " " in (name := str(row[0])) else shorten(name, limit) for row in table.rows]
        shortened = tuple((name, *row[1:]) for name, row in zip(names, table.rows, strict=True))
        yield replace(table, rows=shortened)._drawn(console, tight=True)

    def _drawn(self, console: Console, *, padding: int = 0, tight: bool = False) -> RichTable:
        from rich import box
        from rich.table import Table as RichTable

        ascii_rule = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
        rule = ascii_rule if console.options.ascii_only else box.SIMPLE_HEAD
        drawn = RichTable(box=rule, show_edge=False, padding=(0, padding), pad_edge=False)
        for number, column in enumerate(self.columns):
            left = column.left or not number
            title = printable(console, f"{column.title}\n{column.unit}" if column.unit else column.title)
            overflow: Literal["fold", "ellipsis"] = "fold" if left else "ellipsis"
            drawn.add_column(title, justify="left" if left else "right", no_wrap=not left, overflow=overflow)
        for number, row in enumerate(self.rows):
            style = STYLES[self.looks[number]] if number in self.looks else ""
            shown = (_shown(console, entry, tight) for entry in row)
            drawn.add_row(*shown, style=style, end_section=number in self.gaps)
        return drawn


def _shown(console: Console, entry: Any, tight: bool) -> Text:
    """An entry in the colours of its parts; where it is tight, a spread takes the place of the ratio."""
    from rich.text import Text

    entry = entry if isinstance(entry, Entry) else Entry(str(entry))
    parts = [printable(console, entry.value)]
    if entry.spread:
        parts.append(printable(console, f" ±{'' if tight else ' '}{entry.spread}", "dim"))
    if entry.times and not (tight and entry.spread):
        parts.append(printable(console, f" {entry.times}", "cyan"))
    return Text.assemble(*parts)


def printable(console: Console, text: str, style: str = "") -> Text:
    """Text that the console's encoding can hold: × and ± would end a run whose log file is ASCII."""
    from rich.text import Text

    if console.options.ascii_only:
        text = text.translate(IN_ASCII).encode("ascii", "replace").decode()
    return Text(text, style)


def print_line(console: Console, text: str, style: str = "", indent: str = "") -> None:
    """Print a sentence, wrapped at words; further lines are indented, and nothing is printed of an empty one."""
    lines = printable(console, text, style).wrap(console, console.width - len(indent)) if text else ()
    for number, line in enumerate(lines):
        console.print(printable(console, indent if number else "") + line)


def shorten(name: str, limit: int = 34) -> str:
    """Cut the beginning of a long module path: its end tells layers apart."""
    return name if len(name) <= limit else f"…{name[1 - limit :]}"
