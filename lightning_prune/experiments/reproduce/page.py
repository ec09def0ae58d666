"""The page of a reproduction: ours beside the published, what differs and why; in a terminal, Markdown and HTML."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_prune.experiments.comparison.cells import Spread
from lightning_prune.experiments.reproduce.costs import DRAWS
from lightning_prune.experiments.reproduce.pictures import Picture, pictures
from lightning_prune.experiments.reproduce.recipe import Row
from lightning_prune.experiments.reproduce.run import Reproduction
from lightning_prune.files import write_text
from lightning_prune.report.figures import save_figure
from lightning_prune.report.pages import render
from lightning_prune.report.summary import MINUS
from lightning_prune.report.table import MISSING, Column, Entry, Look, Table, print_line

if TYPE_CHECKING:
    from rich.console import Console

PAPER, OURS = "paper", "ours"
#: Decimals of columns; the others have two.
DECIMALS = {
    "left": 1,
    "params_left": 1,
    "or_left": 1,
    "and_left": 1,
    "removed": 0,
    "latency": 3,
    "faster": 1,
    "time": 0,
    "epoch": 1,
}
DECIMALS |= dict.fromkeys(("energy_removed", "energy_kept", "shown_removed", "shown_kept"), 0)
DECIMALS |= dict.fromkeys(("rpi", "nano", "gpu", "eager", "onnxruntime"), 4)
SIGNED = ("change",)
OPTIONAL = ("params_left", "gpu", "gpu_faster")  # where a terminal is too narrow
Sides = dict[str, dict[str, dict[str, Spread]]]  # {paper or ours: {row: {column: number}}}
EXACT = "32-true"  # the precision that need not be told of
CHOSEN = {
    "last": "the last epoch counts, and no image of the test part chooses anything",
    "best": "as published, the epoch that is best on the test images counts",
}


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    title: str
    text: tuple[str, ...] = ()
    table: Table | None = None
    foot: str = ""
    pictures: tuple[Picture, ...] = ()


def sections(found: Reproduction) -> Iterator[Section]:
    """All that there is to tell, the most wanted first."""
    recipe, scale = found.recipe, found.scale
    if found.cells or not found.complete:
        seeds = f"mean ± standard deviation of {len(scale.seeds)} seeds" if len(scale.seeds) > 1 else "one seed"
        foot = f"{seeds}; {MISSING}: not published, or not run; FLOPs as the papers count them"
        text = () if found.complete else ("The run was interrupted; the same command goes on from here.",)
        yield Section("Ours beside the published", text, results_table(found), foot, tuple(pictures(found)))
    if found.costs:
        foot = f"published architectures, untrained; random rows: mean ± standard deviation of {DRAWS} draws"
        yield Section("Published costs, counted here", (agreement(found),), costs_table(found), foot)
    if found.refused:
        reasons = tuple(f"{one.row}, seed {one.seed}: {' '.join(one.reason.split())}" for one in found.refused)
        yield Section("Not computed", reasons)
    precision = "" if scale.dense is None or scale.dense.precision == EXACT else f" in {scale.dense.precision}"
    trained = (f"Trained{precision}: {CHOSEN[scale.choose]}.",) if scale.task is not None else ()
    yield Section("What differs from the paper, and why", (f"This scale: {scale.about}", *trained, *recipe.known))
    seconds = f"{found.seconds:.0f} s" if found.seconds < 600 else f"{found.seconds / 60:.0f} min"
    where = ", ".join(f"{name} {value}" for name, value in found.machine.items() if value is not None)
    yield Section("Where and how long", (f"{seconds} for all that is shown, whenever it was computed; {where}.",))


def results_table(found: Reproduction) -> Table:
    """Every row of the paper with ours beside it, column by column; or below it."""
    rows = found.recipe.rows
    sides = {
        PAPER: {row.label: _printed(found, row) for row in rows},
        OURS: {row.label: _spreads(found, row) for row in rows},
    }
    return _stacked(found, sides) if found.recipe.stacked else _side_by_side(found, sides)


def _side_by_side(found: Reproduction, sides: Sides) -> Table:
    rows = found.recipe.rows
    columns: list[Column] = [Column("")]
    lines: list[list[str | Entry]] = [[row.label] for row in rows]
    for key, heading in found.recipe.columns.items():
        title, _, unit = heading.partition(", ")
        for who, values in sides.items():
            if any(key in of for of in values.values()):
                columns.append(Column(f"{title}\n{who}", unit, optional=key in OPTIONAL))
                for line, row in zip(lines, rows, strict=True):
                    line.append(_entry(key, values[row.label].get(key)))
    return Table(tuple(columns), tuple(map(tuple, lines)), _looks(found, rows), _gaps(rows))


def _stacked(found: Reproduction, sides: Sides) -> Table:
    known = {key for values in sides.values() for of in values.values() for key in of}
    keys = [key for key in found.recipe.columns if key in known]
    columns = [Column(""), Column("")]
    for key in keys:
        title, _, unit = found.recipe.columns[key].partition(", ")
        columns.append(Column(title, unit, optional=key in OPTIONAL))
    lines: list[tuple[str | Entry, ...]] = []
    of: list[Row] = []
    for row in found.recipe.rows:
        shown = [who for who, values in sides.items() if any(key in values[row.label] for key in keys)]
        for who in shown:
            label = row.label if who == shown[0] else ""
            lines.append((label, who, *(_entry(key, sides[who][row.label].get(key)) for key in keys)))
            of.append(row)
    ends = frozenset(n for n, row in enumerate(of[:-1]) if of[n + 1] is not row)
    return Table(tuple(columns), tuple(lines), _looks(found, of), ends)


def _looks(found: Reproduction, rows: Sequence[Row]) -> dict[int, Look]:
    """Dense models stand out, and rows that were not run stay back."""
    run = {cell.row for cell in found.cells}
    looks: dict[int, Look] = {n: "key" for n, row in enumerate(rows) if row.dense}
    return looks | {n: "quiet" for n, row in enumerate(rows) if row.label not in run}


def _gaps(rows: Sequence[Row]) -> frozenset[int]:
    return frozenset(n for n, row in enumerate(rows[:-1]) if rows[n + 1].model != row.model)


def costs_table(found: Reproduction) -> Table:
    """Published FLOPs and parameters beside those counted here, with the difference; milliseconds if there are some."""
    recipe = found.recipe
    published = {row.label: row.published for row in recipe.rows}
    columns = [Column("")]
    lines: list[list[str | Entry]] = [[cell.row] for cell in found.costs]
    for key, title in (("flops", "FLOPs"), ("params", "parameters"), ("latency", "latency")):
        both = [(published[cell.row].get(key), cell.values.get(key)) for cell in found.costs]
        if not any(ours is not None for _, ours in both):
            continue
        unit, printed = recipe.units.get(key, "ms"), any(paper is not None for paper, _ in both)
        counted = key != "latency"
        digits = max((len(str(paper).partition(".")[2]) for paper, _ in both if paper is not None), default=2)
        columns += [Column(f"{title}\n{PAPER}", unit)] if printed else []
        columns += [Column(f"{title}\n{OURS}", unit)]
        columns += [Column("differ", "%")] if printed and counted else []
        for line, cell, (paper, ours) in zip(lines, found.costs, both, strict=True):
            spread = cell.values.get(f"{key}_spread")
            line += [MISSING if paper is None else f"{paper:.{digits}f}"] if printed else []
            line += [MISSING if ours is None else Entry(f"{ours:.{digits}f}", f"{spread:.{digits}f}" if spread else "")]
            if printed and counted:
                line.append(MISSING if paper is None or ours is None else _signed(100 * (ours / paper - 1), 2))
    return Table(tuple(columns), tuple(map(tuple, lines)))


def agreement(found: Reproduction) -> str:
    """How far the counted costs are from the published ones at most."""
    published = {row.label: row.published for row in found.recipe.rows}
    worst: dict[bool, tuple[float, str]] = {}
    for cell in found.costs:
        drawn = bool(cell.values["flops_spread"])
        for key in ("flops", "params"):
            if key in published[cell.row]:
                off = abs(cell.values[key] / published[cell.row][key] - 1)
                worst[drawn] = max(worst.get(drawn, (0.0, cell.row)), (off, cell.row))
    said = []
    if False in worst:
        said.append(f"Dense models differ from the print by at most {worst[False][0]:.3%}")
    if True in worst:
        said.append(f"random masks and their union by at most {worst[True][0]:.2%} ({worst[True][1]})")
    return "; ".join(said) + "."


def markdown(found: Reproduction) -> str:
    """The page in Markdown; pictures lie beside it."""
    recipe = found.recipe
    parts = [f"# {recipe.item}: {recipe.title}", f"{recipe.paper}. Scale: {found.name}."]
    for section in sections(found):
        parts.append(f"## {section.title}")
        parts += [section.text[0]] if len(section.text) == 1 else []
        parts += ["\n".join(f"- {line}" for line in section.text)] if len(section.text) > 1 else []
        parts += [] if section.table is None else [section.table.markdown()]
        parts += [f"<sub>{section.foot}</sub>"] if section.foot else []
        parts += [f"![{picture.alt}]({picture.name}.png)" for picture in section.pictures]
    return "\n\n".join(parts) + "\n"


def html(found: Reproduction) -> str:
    """The page as one HTML file that needs nothing else."""
    shown = [
        {"section": section, "pictures": [(picture.alt, _address(picture)) for picture in section.pictures]}
        for section in sections(found)
    ]
    recipe = found.recipe
    subtitle = f"{recipe.paper} · scale: {found.name}"
    return render("sections.html", title=f"{recipe.item}: {recipe.title}", subtitle=subtitle, notes=(), shown=shown)


def print_page(found: Reproduction, console: Console | None = None) -> None:
    """Tables and sentences in a terminal."""
    from rich.console import Console

    console = console or Console(highlight=False)
    recipe = found.recipe
    print_line(console, f"{recipe.item}: {recipe.title}", "bold")
    print_line(console, f"{recipe.paper}. Scale: {found.name}.", "dim")
    for section in sections(found):
        console.print()
        print_line(console, section.title, "bold")
        if section.table is not None:
            console.print(section.table)
            print_line(console, section.foot, "dim")
        mark = "- " if len(section.text) > 1 else ""
        for line in section.text:
            print_line(console, mark + line, indent=" " * len(mark))


def write_page(found: Reproduction, folder: str | Path) -> dict[str, Path]:
    """Write ``page.md``, ``page.html`` and the pictures, each as a whole or not at all.

    Raises:
        PruningError: a file cannot be written.
    """
    folder = Path(folder)
    files = {"md": folder / "page.md", "html": folder / "page.html"}
    for kind, text in (("md", markdown(found)), ("html", html(found))):
        write_text(files[kind], text)
    for picture in pictures(found):
        files[picture.name] = folder / f"{picture.name}.png"
        save_figure(picture.draw(), files[picture.name])
    return files


def _printed(found: Reproduction, row: Row) -> dict[str, Spread]:
    return {key: Spread(value, None) for key, value in found.recipe.published(row).items()}


def _spreads(found: Reproduction, row: Row) -> dict[str, Spread]:
    cells = found.of(row)
    keys = dict.fromkeys(key for cell in cells for key in cell.values)
    return {key: Spread.of(cell.values[key] for cell in cells if key in cell.values) for key in keys}


def _entry(key: str, spread: Spread | None) -> str | Entry:
    if spread is None:
        return MISSING
    digits = DECIMALS.get(key, 2)
    value = _signed(spread.mean, digits) if key in SIGNED else f"{spread.mean:,.{digits}f}"
    return Entry(value, "" if spread.deviation is None else f"{spread.deviation:.{digits}f}")


def _signed(value: float, digits: int) -> str:
    text = f"{value:+.{digits}f}".replace("-", MINUS)
    return f"±{text[1:]}" if not float(text[1:]) else text


def _address(picture: Any) -> str:
    stream = io.BytesIO()
    save_figure(picture.draw(), stream)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
