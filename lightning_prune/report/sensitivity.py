"""Sensitivities as a table and as a picture: a row per group, a column per ratio, what is lost at each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lightning_prune.errors import PruningError
from lightning_prune.report.figures import Palette, Theme, figure_of_rows, styled
from lightning_prune.report.table import MISSING, Column, Table
from lightning_prune.sensitivity import Sensitivity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# From nothing lost to most, in one hue (ColorBrewer's Oranges; the dark ones begin at the dark paper).
COLORS = {"light": ("#ffffff", "#fdd0a2", "#fd8d3c", "#a63603"), "dark": ("#161b22", "#5a2d0c", "#c4560c", "#fdbe85")}
NO_NUMBER = "inf"


def sensitivity_table(
    sensitivity: Sensitivity, ratios: Mapping[str, float] | None = None, *, percent: bool = True
) -> Table:
    """A row per group, what it loses at each ratio.

    Args:
        sensitivity: what was measured.
        ratios: {group: ratio} that were chosen, for a last column.
        percent: the metric lies in [0, 1] and is shown times 100.
    """
    asked = _ratios(sensitivity)
    show = _written(sensitivity, percent)
    columns = [Column("group"), Column("channels", optional=True)]
    columns += [Column(f"{100 * r:.3g} %", optional=k % 2 == 1) for k, r in enumerate(asked)]
    rows = []
    for group, curve in sensitivity.curves.items():
        lost = {point.ratio: show(sensitivity.drop(point)) for point in curve}
        chosen = [] if ratios is None else [f"{100 * ratios[group]:.3g} %"]
        rows.append((group, sensitivity.sizes[group], *(lost.get(ratio, MISSING) for ratio in asked), *chosen))
    if ratios is not None:
        columns.append(Column("chosen"))
    return Table(tuple(columns), tuple(rows))


def sensitivity_csv(sensitivity: Sensitivity) -> str:
    """A line per point, after a line of column names; the metric in its own unit."""
    points = sensitivity.points
    titles = ("group", "channels", "ratio", "removed", sensitivity.metric, "drop")
    dense = ("", sum(sensitivity.sizes.values()), 0.0, 0, sensitivity.dense, 0.0)
    rows = ((p.group, sensitivity.sizes[p.group], p.ratio, p.removed, p.value, sensitivity.drop(p)) for p in points)
    return Table.of(titles, [dense, *rows]).csv()


def sensitivity_figure(
    sensitivity: Sensitivity,
    ratios: Mapping[str, float] | None = None,
    theme: Theme = "light",
    *,
    percent: bool = True,
    title: str = "",
    subtitle: str = "",
) -> Figure:
    """Draw a row per group and a cell per ratio: the darker, the more of the metric is lost; the number stands in it.

    Args:
        sensitivity: what was measured.
        ratios: {group: ratio} that were chosen: the cells up to there are framed.
        theme: "light" or "dark".
        percent: the metric lies in [0, 1] and is shown times 100.
        title: heading; "": names the metric.
        subtitle: what explains it.

    Raises:
        PruningError: there is no point.
    """
    if not sensitivity.points:
        raise PruningError("no sensitivity was measured, so there is nothing to draw")
    asked, curves = _ratios(sensitivity), sensitivity.curves
    show = _written(sensitivity, percent)
    drops = {(p.group, p.ratio): sensitivity.drop(p) for p in sensitivity.points}
    most = max((drop for drop in drops.values() if math.isfinite(drop)), default=0.0)
    title = title or f"Sensitivity: {sensitivity.metric} lost by masking one layer alone"
    with styled(theme) as palette:
        figure, axes, size = figure_of_rows(list(curves), palette, title, subtitle, bottom=0.15, right=0.2, top=1.15)
        colors = _colors(theme)
        for row, group in enumerate(curves):
            for column, ratio in enumerate(asked):
                drop = drops.get((group, ratio))
                if drop is None:
                    continue
                share = 1.0 if not math.isfinite(drop) else max(0.0, drop) / most if most > 0 else 0.0
                cell = colors(share**0.5)  # the root: small losses, among which people choose, are told apart
                axes.fill_between((column - 0.5, column + 0.5), row - 0.5, row + 0.5, color=cell, lw=0, zorder=1)
                ink = _ink(cell)
                axes.text(column, row, show(drop), ha="center", va="center", size=size - 0.5, color=ink, zorder=3)
            if ratios is not None:
                _frame(axes, row, sum(ratio <= ratios[group] + 1e-12 for ratio in asked), palette)
        axes.set_xlim(-0.5, len(asked) - 0.5)
        axes.set_xticks(range(len(asked)), [f"{100 * ratio:.3g} %" for ratio in asked], size=size)
        axes.tick_params(axis="x", length=0, top=True, labeltop=True, bottom=False, labelbottom=False, pad=2)
        axes.spines["bottom"].set_visible(False)
    return figure


def _frame(axes: Axes, row: int, cells: int, palette: Palette) -> None:
    if cells:
        x, y = (-0.48, cells - 0.52, cells - 0.52, -0.48, -0.48), (-0.44, -0.44, 0.44, 0.44, -0.44)
        axes.plot(x, [row + at for at in y], color=palette.orders["B"], lw=1.5, zorder=2, clip_on=False)


def _colors(theme: Theme) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("lost", COLORS[theme])


def _ink(cell: tuple[float, ...]) -> str:
    """Black or white, whichever is farther from the cell's colour in luminance."""
    red, green, blue = cell[:3]
    return "#1f2328" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.45 else "#ffffff"


def _ratios(sensitivity: Sensitivity) -> list[float]:
    return sorted({point.ratio for point in sensitivity.points})


def _written(sensitivity: Sensitivity, percent: bool) -> Callable[[float], str]:
    """How a drop is written: all with the same number of decimals, two or three digits of the largest."""
    unit = 100.0 if percent else 1.0
    finite = [abs(unit * drop) for p in sensitivity.points if math.isfinite(drop := sensitivity.drop(p))]
    decimals = 1 if percent else max(0, 2 - math.floor(math.log10(max([*finite, 1e-9]))))

    def write(drop: float) -> str:
        if not math.isfinite(drop):
            return NO_NUMBER
        text = f"{unit * drop:.{decimals}f}"
        return text if text.strip("-0.") else text.lstrip("-")

    return write
