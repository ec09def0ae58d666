"""The table of a report and its lines: one set of cells, shown by the terminal, Markdown and HTML alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning_prune.report.data import DENSE, FINE_TUNED, MASKED, RECONSTRUCTED, PruneReport, ratio

if TYPE_CHECKING:
    from rich.box import Box
    from rich.console import Console
    from rich.text import Text

MISSING = "\u2013"  # what was not measured
MINUS = "\u2212"
UNITS = {"k": 1e3, "M": 1e6, "G": 1e9}
TIMES = "\u00d7"
IN_ASCII = {TIMES: "x", "±": "+-", MINUS: "-", MISSING: "-", "→": "->", "µ": "u", "…": "..."}


@dataclass(frozen=True)
class Cell:
    """A number, and what stands small beside it: its spread, and its ratio to the dense model's."""

    value: str
    spread: str = ""
    times: str = ""

    def text(self) -> str:
        """The cell as a line: "4.93 ± 0.11 (2.5×)"."""
        spread = f" ± {self.spread}" if self.spread else ""
        return f"{self.value}{spread} ({self.times})" if self.times else f"{self.value}{spread}"


@dataclass(frozen=True)
class Column:
    """One quantity over all stages."""

    title: str
    unit: str
    cells: tuple[Cell, ...]


def columns(report: PruneReport) -> tuple[Column, ...]:
    """The columns of the table, a cell for every stage, in the order in which they are shown."""
    stages = report.stages
    accuracy = [MISSING if s.accuracy is None else f"{100 * s.accuracy:.2f}" for s in stages]
    return (
        Column(capitalized(report.metric), "%", tuple(Cell(text) for text in accuracy)),
        _column("Parameters", "M", [s.params for s in stages], report, scales=((1e6, "M"), (1e3, "k")), times=True),
        _column(
            "FLOPs",
            "M",
            [report.flops(s) for s in stages],
            report,
            scales=((1e10, "G"), (1e6, "M")),
            times=True,
        ),
        _column(
            f"{report.device} latency",
            "ms",
            [s.latency_ms for s in stages],
            report,
            times=True,
            # a ± promises half a width, the distance between the quartiles is a whole one
            spreads=[None if s.latency_iqr_ms is None else s.latency_iqr_ms / 2 for s in stages],
        ),
        _column("Epoch", "s", [report.epoch_seconds(s) for s in stages], report),
        _column("On disk", "MB", [s.size_bytes and s.size_bytes / 1e6 for s in stages], report),
    )


def _column(
    title: str,
    unit: str,
    values: list[Any],
    report: PruneReport,
    *,
    scales: tuple[tuple[float, str], ...] = (),
    times: bool = False,
    spreads: list[float | None] | None = None,
) -> Column:
    """Format a quantity in one unit with one number of decimals, so that a column can be compared by eye."""
    known = [abs(v) for v in values if v is not None and math.isfinite(v)]
    if scales:
        unit = next((name for least, name in scales if max(known, default=least) >= least), scales[-1][1])
        values = [None if v is None else v / UNITS[unit] for v in values]
        known = [v / UNITS[unit] for v in known]
    digits = _decimals([v for v in known if v])
    dense = next((v for s, v in zip(report.stages, values, strict=True) if s.name == DENSE), None)
    cells = []
    for value, spread in zip(values, spreads or [None] * len(values), strict=True):
        if value is None:
            cells.append(Cell(MISSING))
            continue
        factor = ratio(dense, value) if times else None
        shown = "" if factor is None or 0.95 < factor < 1.05 else f"{factor:.1f}{TIMES}"
        cells.append(Cell(f"{value:,.{digits}f}", "" if spread is None else f"{spread:,.{digits}f}", shown))
    return Column(title, unit, tuple(cells))


def _decimals(values: list[float]) -> int:
    """Decimals that keep three digits of the smallest value without drowning the largest."""
    if not values or max(values) >= 1e5:
        return 0
    usual = 2 if max(values) < 100 else 1
    return max(usual, min(2 - math.floor(math.log10(min(values))), 6))


def summary_line(report: PruneReport) -> str:
    """What pruning bought: parameters, FLOPs, latency, and the accuracy it cost."""
    parts = [
        times(report.params_cut, "fewer parameters", "more parameters"),
        times(report.flops_cut, "fewer FLOPs", "more FLOPs"),
        times(report.latency_gain, f"lower {report.device} latency", f"higher {report.device} latency"),
    ]
    if report.accuracy_change is not None:
        parts.append(f"{report.metric} {points(report.accuracy_change)} after fine-tuning")
    return ", ".join(part for part in parts if part)


def lossless_line(report: PruneReport) -> str:
    """Whether masked and reconstructed model agree, with the measured error."""
    found = report.losslessness
    if found is None:
        return "losslessness: not checked"
    verdict = "lossless" if found.passed else "NOT lossless"
    line = f"{verdict}: max relative error {found.max_rel_error:.1e} in {found.dtype}"
    return f"{line}, {found.changed:,} of {found.total:,} predictions changed" if found.total else line


def savings_line(report: PruneReport) -> str:
    """What an epoch of fine-tuning takes before and after reconstruction; empty where it was not measured."""
    first, second = report.order_epoch_seconds("A"), report.order_epoch_seconds("B")
    if first is None and second is None:
        return ""
    shown = [
        f"{value:.{_decimals([value])}f} s/epoch in order {order} ({what})"
        for order, what, value in (("A", MASKED, first), ("B", RECONSTRUCTED, second))
        if value is not None
    ]
    line = f"fine-tuning: {' against '.join(shown)}"
    if report.epoch_speedup is not None:
        line += f", {times(report.epoch_speedup, 'faster', 'slower')}"
    tuned = [(order, report.stage(name)) for order, name in FINE_TUNED.items()]
    reached = [f"{order} {100 * s.accuracy:.2f} %" for order, s in tuned if s and s.accuracy is not None]
    return f"{line}; {report.metric} {', '.join(reached)}" if reached else line


def points(change: float) -> str:
    """A difference in per cent, signed: "−0.28 points"."""
    text = f"{change:+.2f}"
    text = "±0.00" if float(text) == 0 else text.replace("-", MINUS)
    return f"{text} points"


def times(factor: float | None, better: str, worse: str) -> str:
    """A factor with what it is of: "4.0× fewer parameters"; empty where there is none."""
    if factor is None:
        return ""
    return f"{factor:.1f}{TIMES} {better}" if factor >= 1 else f"{1 / factor:.1f}{TIMES} {worse}"


def capitalized(metric: str) -> str:
    """A metric's name at the start of a line; mIoU and mAP stay as they are.

    Example:
        >>> capitalized("accuracy"), capitalized("mIoU")
        ('Accuracy', 'mIoU')
    """
    return metric.capitalize() if metric.islower() else metric


def footnote(report: PruneReport) -> str:
    """How to read the table."""
    parts = [f"{TIMES}: times less than {DENSE}", f"FLOPs by the convention {report.convention!r}"]
    if any(stage.latency_iqr_ms is not None for stage in report.stages):
        parts.append("latency: median ± half the interquartile range")
    return "; ".join(parts)


def markdown_table(report: PruneReport) -> str:
    """The table and its lines in Markdown, for a README.

    Example:
        >>> from lightning_prune.report import StageResult
        >>> report = PruneReport("demo", stages=(StageResult("dense", accuracy=0.5),))
        >>> print(markdown_table(report).splitlines()[2][:17])
        | dense | 50.00 |
    """
    cols = columns(report)
    lines = ["| Model | " + " | ".join(_cell(f"{c.title} ({c.unit})") for c in cols) + " |"]
    lines.append("| --- |" + " ---: |" * len(cols))
    for row, stage in enumerate(report.stages):
        lines.append(f"| {_cell(stage.name)} | " + " | ".join(_cell(c.cells[row].text()) for c in cols) + " |")
    said = [line for line in (summary_line(report), lossless_line(report), savings_line(report)) if line]
    return "\n".join([*lines, "", *(f"- {line}" for line in said), "", f"<sub>{footnote(report)}</sub>", ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def is_ascii(console: Console) -> bool:
    """Whether it cannot hold × and ±: a log file may be ASCII, where they would end the run."""
    return not console.encoding.lower().startswith("utf")


def printable(console: Console, text: str, style: str = "") -> Text:
    """Text that the console's encoding can hold."""
    from rich.text import Text

    if is_ascii(console):
        for sign, word in IN_ASCII.items():
            text = text.replace(sign, word)
        text = text.encode("ascii", "replace").decode()
    return Text(text, style)


def head_rule(console: Console) -> Box:
    """A rule under the heads of a table, and no other line."""
    from rich import box

    plain = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
    return plain if is_ascii(console) else box.SIMPLE_HEAD


def print_report(report: PruneReport, console: Console | None = None) -> None:
    """Print the table and its lines; fits 80 columns, uses 100, and reads the same in a log without colours.

    Args:
        report: what was measured.
        console: where to; the terminal by default.
    """
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    shown = partial(printable, console)
    roomy = console.width >= 100
    table = Table(box=head_rule(console), show_edge=False, padding=(0, 1) if roomy else 0, pad_edge=False)
    table.add_column("")
    cols = columns(report)
    for column in cols:
        table.add_column(shown(f"{column.title}\n{column.unit}"), justify="right", no_wrap=True)
    for row, stage in enumerate(report.stages):
        cells = []
        for column in cols:
            cell = column.cells[row]
            text = shown(cell.value)
            if cell.spread:
                text.append_text(shown(f" ± {cell.spread}" if roomy else f" ±{cell.spread}", "dim"))
            if any(c.times for c in column.cells) and (roomy or not any(c.spread for c in column.cells)):
                width = max(len(c.times) for c in column.cells)
                text.append_text(shown(f" {cell.times:>{width}}", "cyan"))
            cells.append(text)
        table.add_row(shown(stage.name, "bold" if stage.name in (DENSE, FINE_TUNED["B"]) else ""), *cells)

    console.print()
    console.print(shown(report.title, "bold"))
    console.print()
    console.print(table)
    console.print()
    if summary := summary_line(report):
        console.print(shown(summary, "bold"))
    found = report.losslessness
    console.print(shown(lossless_line(report), "yellow" if found is None else "green" if found.passed else "bold red"))
    for line in (savings_line(report), *report.notes):
        if line:
            console.print(shown(line))
    console.print(shown(footnote(report), "dim"))
