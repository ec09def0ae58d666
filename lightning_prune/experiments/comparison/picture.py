"""Accuracy against FLOPs: a line per criterion through its ratios, error bars over seeds."""

from __future__ import annotations

import statistics
from itertools import cycle
from typing import TYPE_CHECKING, Any

from lightning_prune.errors import PruningError
from lightning_prune.experiments.comparison.cells import Comparison, Row
from lightning_prune.report.figures import DPI, Palette, Theme, add_title, styled
from lightning_prune.report.summary import capitalized

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, safe for the colour-blind; markers tell them apart too, and go on where colours repeat.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#59636e")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
PANELS = {"before": "before fine-tuning", "after": "after fine-tuning"}


def comparison_figure(comparison: Comparison, theme: Theme = "light") -> Figure:
    """Draw accuracy against the multiply-accumulates that are left, before and after fine-tuning.

    Points are means, bars a standard deviation over seeds in either direction. The legend names criteria from the
    most accurate to the least, by the mean over ratios after fine-tuning. Where one lost several times what the others
    did, the right panel names it at its lower edge, lest it flatten the rest.

    Args:
        comparison: what was measured.
        theme: "light" or "dark".

    Raises:
        PruningError: it has no cell.
    """
    if not comparison.cells:
        raise PruningError("the comparison has no cell, so there is nothing to draw")
    from matplotlib.figure import Figure

    curves: dict[str, list[Row]] = {}
    for row in comparison.rows:
        curves.setdefault(row.criterion, []).append(row)
    criteria = dict.fromkeys(cell.criterion for cell in comparison.cells)
    colors, markers = dict(zip(criteria, cycle(COLORS))), dict(zip(criteria, cycle(MARKERS)))
    ranked = sorted(curves, key=lambda name: -statistics.fmean(row.after.mean for row in curves[name]))
    with styled(theme) as palette:
        height = max(4.6, 1.5 + 0.23 * (len(curves) + 1))
        figure = Figure(figsize=(11.0, height), dpi=DPI)
        grid = {"left": 0.06, "top": 1 - 0.95 / height, "bottom": 0.55 / height, "wspace": 0.14}
        panels = figure.subplots(1, 2, gridspec_kw=grid)
        for axes, (when, title) in zip(panels, PANELS.items(), strict=True):
            for criterion in ranked:
                look = {"color": colors[criterion], "marker": markers[criterion], "mec": palette.paper}
                _curve(axes, curves[criterion], when, comparison, look)
            _finish(axes, comparison, title, palette)
        _below(panels[1], comparison, colors)
        place: dict[str, Any] = {"loc": "center right", "bbox_to_anchor": (0.995, 0.5), "borderaxespad": 0}
        legend = figure.legend(*panels[1].get_legend_handles_labels(), frameon=False, handlelength=2.2, **place)
        width = legend.get_window_extent().width / figure.bbox.width  # of names, which may be long
        panels[0].get_gridspec().update(right=0.985 - width)
        seeds = max(row.seeds for row in comparison.rows)
        bars = f"mean of {seeds} seeds, bars: ± one standard deviation" if seeds > 1 else "one seed"
        add_title(figure, palette, f"{capitalized(comparison.metric)} against FLOPs (%)", bars)
    return figure


def _curve(axes: Axes, rows: list[Row], when: str, comparison: Comparison, look: dict[str, Any]) -> None:
    share = 100 / comparison.dense.macs
    spreads = [(row.macs, getattr(row, when)) for row in sorted(rows, key=lambda row: row.macs.mean)]
    x, y = [macs.mean * share for macs, _ in spreads], [100 * accuracy.mean for _, accuracy in spreads]
    width = [(macs.deviation or 0) * share for macs, _ in spreads]
    height = [100 * (accuracy.deviation or 0) for _, accuracy in spreads]
    drawn = axes.errorbar(x, y, height, width, lw=1.5, elinewidth=1.0, capsize=2, zorder=3, ms=7, mew=0.5, **look)
    drawn[0].set_label(rows[0].criterion)


def _finish(axes: Axes, comparison: Comparison, title: str, palette: Palette) -> None:
    accuracy = 100 * comparison.dense.accuracy
    axes.axhline(accuracy, color=palette.quiet, lw=1.2, ls=(0, (5, 3)), zorder=1, label="dense")
    axes.set_title(title, loc="left", size=10, color=palette.ink)
    axes.set_xlabel("multiply-accumulates left (% of dense)")
    axes.grid(color=palette.track, lw=0.6, alpha=0.5)
    axes.spines["left"].set_visible(False)
    axes.tick_params(length=0, colors=palette.quiet)
    low, high = axes.get_ylim()
    axes.set_ylim(max(low, -2.0), min(high, 101.0) if high > 100 else high)
    axes.set_xlim(left=max(0.0, axes.get_xlim()[0]))


def _below(axes: Axes, comparison: Comparison, colors: dict[str, str]) -> None:
    """Let the axis begin where most rows are, and say at its edge what lies below."""
    dense = comparison.dense.accuracy
    lost = {row: dense - row.after.mean for row in comparison.rows}
    limit = max(4 * statistics.median(lost.values()), 0.05)
    outside = sorted((row for row, loss in lost.items() if loss > limit), key=lambda row: row.macs.mean)
    inside = [row for row in lost if row not in outside]
    if not outside or not inside:
        return
    low = min(row.after.mean - (row.after.deviation or 0) for row in inside)
    high = max(dense, *(row.after.mean + (row.after.deviation or 0) for row in inside))
    span = 100 * max(high - low, 0.01)
    axes.set_ylim(100 * low - (0.12 + 0.06 * len(outside)) * span, min(100 * high + 0.08 * span, 101.0))
    for line, row in enumerate(outside):
        axes.annotate(
            f"\N{DOWNWARDS ARROW} {row.criterion} {100 * row.after.mean:.1f}",
            (100 * row.macs.mean / comparison.dense.macs, 0),
            (0, 6 + 13 * line),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            size=9,
            color=colors[row.criterion],
        )
