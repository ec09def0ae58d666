"""A report in a table and a few sentences, the same in a terminal, in Markdown and on the page."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import compress
from typing import TYPE_CHECKING, Any

from lightning_prune.report.data import DENSE, FINE_TUNED, MASKED, RECONSTRUCTED, PruneReport, ratio
from lightning_prune.report.table import MISSING, TIMES, Column, Entry, Look, Table, print_line

if TYPE_CHECKING:
    from rich.console import Console

MINUS = "\u2212"
UNITS = {"k": 1e3, "M": 1e6, "G": 1e9}


def stages_table(report: PruneReport) -> Table:
    """A row per stage, a column per quantity that was measured, in one unit with one number of decimals."""
    stages = report.stages
    # a ± promises half a width, the distance between the quartiles is a whole one
    spreads = [s.latency_iqr_ms and s.latency_iqr_ms / 2 for s in stages]
    sizes = [s.size_bytes and s.size_bytes / 1e6 for s in stages]
    accuracies = [MISSING if s.accuracy is None else f"{100 * s.accuracy:.2f}" for s in stages]
    dense = next((number for number, s in enumerate(stages) if s.name == DENSE), None)
    columns, *rows = zip(
        (Column("Model"), *(stage.name for stage in stages)),
        (Column(capitalized(report.metric), "%"), *accuracies),
        _quantity("Parameters", *_scaled([s.params for s in stages], {"M": 1e6, "k": 0}), dense),
        _quantity("FLOPs", *_scaled([report.flops(s) for s in stages], {"G": 1e10, "M": 0}), dense),
        _quantity(f"{report.device} latency", [s.latency_ms for s in stages], "ms", dense, spreads),
        _quantity("Epoch", [s.epoch_seconds for s in stages], "s"),
        _quantity("On disk", sizes, "MB"),
        strict=True,
    )
    measured = [any(str(entry) != MISSING for entry in entries) for entries in zip(*rows, strict=True)]
    if any(measured[1:]):  # else there is nothing to show, which is shown
        columns, *rows = (tuple(compress(line, measured)) for line in (columns, *rows))
    looks: dict[int, Look] = {number: "key" for number, s in enumerate(stages) if s.name in (DENSE, FINE_TUNED["B"])}
    return Table(columns, tuple(rows), looks)


def _scaled(values: list[Any], least: dict[str, float]) -> tuple[list[Any], str]:
    """Values in the first unit that their largest one reaches, or in the last, and that unit."""
    largest = max((v for v in values if v is not None and math.isfinite(v)), default=math.inf)
    unit = next(name for name, limit in least.items() if largest >= limit)
    return [None if v is None else v / UNITS[unit] for v in values], unit


def _quantity(
    title: str, values: list[Any], unit: str, dense: int | None = None, spreads: list[float | None] | None = None
) -> Iterator[Any]:
    """A column and its entries in one number of decimals, with ratios to the row `dense`."""
    yield Column(title, unit)
    digits = _decimals([abs(v) for v in values if v and math.isfinite(v)])
    for value, spread in zip(values, spreads or [None] * len(values), strict=True):
        factor = None if dense is None else ratio(values[dense], value)
        shown = "" if factor is None or 0.95 < factor < 1.05 else f"{factor:.1f}{TIMES}"
        width = "" if spread is None else f"{spread:,.{digits}f}"
        yield MISSING if value is None else Entry(f"{value:,.{digits}f}", width, shown)


def _decimals(values: list[float]) -> int:
    """Decimals that keep three digits of the smallest value without drowning the largest."""
    if not values or max(values) >= 1e5:
        return 0
    usual = 2 if max(values) < 100 else 1
    return max(usual, min(2 - math.floor(math.log10(min(values))), 6))


def gains(report: PruneReport) -> list[str]:
    """What the reconstructed model saves: "4.0× fewer parameters" and the like, as far as it was measured."""
    factors = (
        times(report.params_cut, "fewer parameters", "more parameters"),
        times(report.flops_cut, "fewer FLOPs", "more FLOPs"),
        times(report.latency_gain, f"lower {report.device} latency", f"higher {report.device} latency"),
    )
    return [text for text in factors if text]


def summary_line(report: PruneReport) -> str:
    """What pruning bought: parameters, FLOPs, latency, and the accuracy it cost."""
    change = report.accuracy_change
    cost = [] if change is None else [f"{report.metric} {points(change)} after fine-tuning"]
    return ", ".join(gains(report) + cost)


def lossless_line(report: PruneReport) -> str:
    """Whether masked and reconstructed model agree, with the measured error."""
    found = report.losslessness
    if found is None:
        return "losslessness: not checked"
    verdict = "lossless" if found.passed else "NOT lossless"
    line = f"{verdict}: max relative error {found.max_rel_error:.1e} in {found.dtype}"
    changed, total = report.changed_predictions
    return f"{line}, {changed:,} of {total:,} predictions changed" if total else line


def savings_line(report: PruneReport) -> str:
    """What an epoch of fine-tuning takes before and after reconstruction; empty where it was not measured."""
    tuned = {order: report.stage(name) for order, name in FINE_TUNED.items()}
    what = {"A": MASKED, "B": RECONSTRUCTED}
    shown = [
        f"{stage.epoch_seconds:.{_decimals([stage.epoch_seconds])}f} s/epoch in order {order} ({what[order]})"
        for order, stage in tuned.items()
        if stage.epoch_seconds is not None
    ]
    if not shown:
        return ""
    line = f"fine-tuning: {' against '.join(shown)}"
    if report.epoch_speedup is not None:
        line += f", {times(report.epoch_speedup, 'faster', 'slower')}"
    reached = [f"{order} {100 * s.accuracy:.2f} %" for order, s in tuned.items() if s.accuracy is not None]
    return f"{line}; {report.metric} {', '.join(reached)}" if reached else line


def points(change: float) -> str:
    """A difference in per cent, signed: "−0.28 points"."""
    text = f"{change:+.2f}".replace("-", MINUS)
    return f"{'±0.00' if text[1:] == '0.00' else text} points"


def times(factor: float | None, better: str, worse: str) -> str:
    """A factor with what it is of: "4.0× fewer parameters"; empty where there is none."""
    if factor is None:
        return ""
    return f"{factor:.1f}{TIMES} {better}" if factor >= 1 else f"{1 / factor:.1f}{TIMES} {worse}"


def capitalized(metric: str) -> str:
    """A metric's name at the start of a line; mIoU and mAP stay as they are."""
    return metric.capitalize() if metric.islower() else metric


def footnote(report: PruneReport) -> str:
    """How to read the table."""
    parts = [f"{TIMES}: times less than {DENSE}", f"FLOPs by the convention {report.convention!r}"]
    if any(stage.latency_iqr_ms is not None for stage in report.stages):
        parts.append("latency: median ± half the interquartile range")
    return "; ".join(parts)


def markdown_table(report: PruneReport) -> str:
    """The table and its sentences in Markdown, for a README.

    Example:
        >>> from lightning_prune.report import StageResult
        >>> report = PruneReport("demo", stages=(StageResult("dense", accuracy=0.5),))
        >>> print(markdown_table(report).splitlines()[2][:17])
        | dense | 50.00 |
    """
    said = [line for line in (summary_line(report), lossless_line(report), savings_line(report)) if line]
    lines = [stages_table(report).markdown(), "", *(f"- {line}" for line in said), ""]
    return "\n".join([*lines, f"<sub>{footnote(report)}</sub>", ""])


def print_report(report: PruneReport, console: Console | None = None) -> None:
    """Print the table and its sentences; fits 80 columns, uses 100, and reads the same in a log without colours.

    Args:
        report: what was measured.
        console: where to; the terminal by default.
    """
    from rich.console import Console

    console = console or Console()
    console.print()
    print_line(console, report.title, "bold")
    console.print()
    console.print(stages_table(report))
    console.print()
    found = report.losslessness
    print_line(console, summary_line(report), "bold")
    print_line(console, lossless_line(report), "yellow" if found is None else "green" if found.passed else "bold red")
    for line in (savings_line(report), *report.notes):
        print_line(console, line)
    print_line(console, footnote(report), "dim")
