"""Pictures of a report: channels kept per layer, and accuracy against time in both orders of fine-tuning.

Matplotlib is imported when a picture is drawn; no backend is chosen, no style is left behind.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from lightning_prune.errors import PruningError
from lightning_prune.files import atomic
from lightning_prune.report import DENSE, LayerChannels, PruneReport
from lightning_prune.report.table import capitalized

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

Theme = Literal["light", "dark"]
DPI = 150
MARKERS = {"A": "s", "B": "o"}  # told apart without colour too
WIDTH = 8.0  # inches: about the text of a README


@dataclass(frozen=True)
class Palette:
    """Colours of one theme; the two data colours are Okabe and Ito's, safe for the colour-blind."""

    paper: str
    ink: str
    quiet: str
    band: str
    track: str
    orders: dict[str, str]


PALETTES: dict[str, Palette] = {
    "light": Palette("#ffffff", "#1f2328", "#59636e", "#f4f6f8", "#c3cad2", {"A": "#c04f00", "B": "#0072b2"}),
    "dark": Palette("#161b22", "#e6edf3", "#9aa4af", "#1d242d", "#4a535e", {"A": "#e69f00", "B": "#56b4e9"}),
}


@contextmanager
def styled(theme: Theme) -> Iterator[Palette]:
    """Matplotlib's defaults with ours on top, whatever the user has set; all of it undone at the end."""
    import matplotlib

    palette = PALETTES[theme]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "figure.facecolor": palette.paper,
                "savefig.facecolor": palette.paper,
                "axes.facecolor": "none",
                "text.color": palette.ink,
                "axes.labelcolor": palette.quiet,
                "xtick.color": palette.quiet,
                "ytick.color": palette.ink,
                "font.family": ["DejaVu Sans"],
                "font.size": 10,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.edgecolor": palette.track,
                "svg.hashsalt": "lightning-prune",
            }
        )
        yield palette


def channels_figure(report: PruneReport, theme: Theme = "light") -> Figure:
    """Draw a bar per layer: the outline is the dense layer, the filled part what was kept.

    Args:
        report: its `layers` are drawn from top to bottom.
        theme: "light" or "dark".

    Raises:
        PruningError: the report has no layers.
    """
    if not report.layers:
        raise PruningError("the report names no layers, so there are no channels to draw")
    from matplotlib.figure import Figure

    layers, rows = report.layers, len(report.layers)
    pitch = 0.27 if rows <= 24 else 0.215  # inches a row
    size = 9 if rows <= 24 else 8
    top, bottom = 0.85, 0.3
    height = top + rows * pitch + bottom
    names = [shorten(layer.layer) for layer in layers]
    left = 0.35 + max(map(len, names)) * size * 0.62 / 72  # a character of DejaVu Sans is about 0.6 of its size
    with styled(theme) as palette:
        figure = Figure(figsize=(WIDTH, height), dpi=DPI)
        axes = figure.add_axes((left / WIDTH, bottom / height, 1 - (left + 0.75) / WIDTH, rows * pitch / height))
        axes.set(ylim=(rows - 0.5, -0.5), xlim=(0, max(layer.dense for layer in layers) * 1.2))
        for start, end in bands(layers)[1::2]:
            # from the names' left edge to the paper's right one
            axes.axhspan(start - 0.5, end + 0.5, xmin=-5, xmax=5, color=palette.band, lw=0, zorder=0, clip_on=False)
        at = range(rows)
        axes.barh(at, [layer.dense for layer in layers], 0.62, fc=palette.paper, ec=palette.track, lw=0.9, zorder=2)
        axes.barh(at, [layer.kept for layer in layers], 0.62, color=palette.orders["B"], lw=0, zorder=3)
        for row, layer in enumerate(layers):
            text = f"{layer.kept} of {layer.dense}" if layer.kept < layer.dense else f"all {layer.dense}"
            axes.annotate(text, (layer.dense, row), (5, 0), textcoords="offset points", va="center_baseline", size=size)
            axes.annotate(
                f"{100 * layer.kept / max(layer.dense, 1):.0f} %",
                (1, row),
                (44, 0),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right",
                va="center_baseline",
                color=palette.quiet,
                size=size,
            )
        axes.set_yticks(list(at), names, size=size)
        axes.tick_params(axis="both", length=0)
        axes.set_xticks([])
        axes.spines[["bottom", "left"]].set_visible(False)
        axes.annotate(
            "kept",
            (1, 1),
            (44, 5),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="right",
            va="bottom",
            color=palette.quiet,
            size=size,
        )
        kept, dense = sum(layer.kept for layer in layers), sum(layer.dense for layer in layers)
        share = 100 * kept / max(dense, 1)
        add_title(
            figure,
            palette,
            "Channels kept per layer",
            f"filled: kept, outline: dense; {kept:,} of {dense:,} in all ({share:.0f} %)",
        )
    return figure


def accuracy_time_figure(report: PruneReport, theme: Theme = "light") -> Figure:
    """Draw accuracy against wall-clock time: a line per order, the dense model as reference.

    Args:
        report: its `timings` are drawn; time counts from the start of pruning.
        theme: "light" or "dark".

    Raises:
        PruningError: no epoch of either order has an accuracy.
    """
    curves = {
        timing.order: [(e.elapsed_seconds, 100 * e.accuracy) for e in timing.epochs if e.accuracy is not None]
        for timing in report.timings
    }
    curves = {order: curve for order, curve in curves.items() if curve}
    if not curves:
        raise PruningError("the report has no epoch with an accuracy, so there is nothing to draw against time")
    from matplotlib.figure import Figure

    reference = None if report.dense_validation is None else 100 * report.dense_validation
    longest = max(curve[-1][0] for curve in curves.values())
    unit, divisor = time_unit(longest)
    heights = [y for curve in curves.values() for _, y in curve] + ([] if reference is None else [reference])
    low, high = min(heights), max(heights)
    span = max(high - low, 1.0)
    with styled(theme) as palette:
        figure = Figure(figsize=(WIDTH, 4.4), dpi=DPI)
        axes = figure.add_axes((0.085, 0.125, 0.875, 0.68))
        axes.set(xlim=(0, 1.08 * longest / divisor), ylim=(low - 0.16 * span, high + 0.24 * span))
        floor, ceiling = axes.get_ylim()
        axes.set_yticks([tick for tick in axes.get_yticks() if max(floor, 0) <= tick <= min(ceiling, 100.0001)])
        axes.grid(axis="y", color=palette.track, lw=0.6, alpha=0.5)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0, colors=palette.quiet)
        axes.set_xlabel(f"wall-clock time since the start of pruning ({unit})")
        labels = []
        if reference is not None:
            axes.axhline(reference, color=palette.quiet, lw=1.2, ls=(0, (5, 3)), zorder=1, label=DENSE)
            labels.append(_Label(f"{DENSE} {reference:.2f} %", (0.0, reference), palette.quiet, corner=True))
        for order, curve in sorted(curves.items()):
            x, y = [t / divisor for t, _ in curve], [a for _, a in curve]
            color = palette.orders[order]
            axes.plot(
                x,
                y,
                color=color,
                lw=2,
                marker=MARKERS[order],
                ms=6,
                mfc=palette.paper,
                mec=color,
                mew=1.6,
                zorder=3,
                label=f"order {order}",
            )
            axes.plot(x[-1:], y[-1:], color=color, marker=MARKERS[order], ms=7, zorder=4)
            labels.append(_Label(f"order {order}\n{y[-1]:.2f} % after {duration(curve[-1][0])}", (x[-1], y[-1]), color))
        _place(figure, axes, labels)
        what = {"A": "A: fine-tune, then reconstruct", "B": "B: reconstruct, then fine-tune"}
        add_title(
            figure,
            palette,
            f"{capitalized(report.metric)} against time (%)",
            "validation, a marker per epoch; " + "; ".join(what[order] for order in sorted(curves)),
        )
    return figure


def save_figure(figure: Figure, target: Path | IO[bytes], kind: Literal["png", "svg"] = "png") -> None:
    """Write a figure, PNG at 150 dpi or SVG; to a path as a whole or not at all.

    Args:
        figure: from `channels_figure` or `accuracy_time_figure`.
        target: path or binary stream.
        kind: format.
    """
    import matplotlib

    # the same data give the same bytes
    metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {"Software": None}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams["svg.hashsalt"] = "lightning-prune"
        options: dict[str, Any] = {
            "format": kind,
            "dpi": DPI,
            "facecolor": figure.get_facecolor(),
            "metadata": metadata,
        }
        if not isinstance(target, Path):
            figure.savefig(target, **options)
            return
        with atomic(target) as stream:
            figure.savefig(stream, **options)


def bands(layers: tuple[LayerChannels, ...]) -> list[tuple[int, int]]:
    """First and last row of every stage: consecutive layers whose names share the numbered beginning.

    Example:
        >>> names = "conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1"
        >>> bands(tuple(LayerChannels(name, 8, 4) for name in names))
        [(0, 0), (1, 2), (3, 3)]
    """
    found: list[tuple[int, int]] = []
    last = None
    for row, layer in enumerate(layers):
        numbered = re.match(r"(.*?\d+)\.", layer.layer)
        stage = numbered.group(1) if numbered else layer.layer.split(".")[0]
        if stage == last:
            found[-1] = (found[-1][0], row)
        else:
            found.append((row, row))
        last = stage
    return found


def shorten(name: str, limit: int = 34) -> str:
    """Cut the beginning of a long module path: its end tells layers apart."""
    return name if len(name) <= limit else f"…{name[1 - limit :]}"


def time_unit(seconds: float) -> tuple[str, float]:
    """Unit in which an axis up to `seconds` reads best, and its length in seconds."""
    return ("s", 1.0) if seconds < 600 else ("min", 60.0) if seconds < 3 * 3600 else ("h", 3600.0)


def duration(seconds: float) -> str:
    """A time as one says it.

    Example:
        >>> duration(8.25), duration(96), duration(754), duration(8100)
        ('8.2 s', '96 s', '12 min 34 s', '2 h 15 min')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 600:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def add_title(figure: Figure, palette: Palette, title: str, subtitle: str) -> None:
    """Write a heading and what explains it into the top left corner."""
    height = figure.get_figheight()
    figure.text(0.18 / WIDTH, 1 - 0.2 / height, title, size=13, weight="bold", va="top")
    figure.text(0.18 / WIDTH, 1 - 0.48 / height, subtitle, size=9.5, color=palette.quiet, va="top")


@dataclass(frozen=True)
class _Label:
    text: str
    at: tuple[float, float]
    color: str
    corner: bool = False  # belongs to a whole line: may stand anywhere along it


def _place(figure: Figure, axes: Axes, labels: list[_Label]) -> None:
    """Put every label where it covers least of the curves and no other label; ends of curves first."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    ink = [point for line in axes.lines for point in _along(axes.transData.transform(_ends(axes, line)))]
    frame = axes.get_window_extent(renderer)
    level = next((label.at[1] for label in labels if label.corner), math.nan)
    reference = axes.transData.transform((0, level))[1]
    taken: list[Any] = []
    for label in sorted(labels, key=lambda one: one.corner):
        best: tuple[float, Text, Any] | None = None
        for rank, (x, y, dx, dy, ha, va) in enumerate(_candidates(label, axes.get_xlim())):
            text = axes.annotate(
                label.text,
                (x, y),
                (dx, dy),
                textcoords="offset points",
                ha=ha,
                va=va,
                color=label.color,
                size=10,
                weight="normal" if label.corner else "bold",
                linespacing=1.25,
                zorder=5,
            )
            box = text.get_window_extent(renderer)
            padded = box.padded(4)
            outside = box.x0 < frame.x0 or box.x1 > frame.x1 + 20 or box.y0 < frame.y0 or box.y1 > frame.y1 + 20
            cost = sum(padded.contains(*point) for point in ink) + 1000.0 * outside + 0.01 * rank
            if not math.isnan(level) and not label.corner:  # on the point's side of the dense line, if it can
                cost += 2.5 * ((box.y0 > reference) != (label.at[1] > level))
            cost += 500.0 * sum(padded.overlaps(other) for other in taken)
            if best is None or cost < best[0]:
                if best is not None:
                    best[1].remove()
                best = (cost, text, box)
            else:
                text.remove()
        if best is not None:
            taken.append(best[2])


def _candidates(label: _Label, xlim: tuple[float, float]) -> list[tuple[float, float, float, float, str, str]]:
    x, y = label.at
    if label.corner:
        spots = [xlim[0] + share * (xlim[1] - xlim[0]) for share in (0.01, 0.12, 0.25, 0.4, 0.55, 0.7)]
        return [(spot, y, 0, dy, "left", va) for dy, va in ((4, "bottom"), (-5, "top")) for spot in spots]
    near = [(0, 12, "center", "bottom"), (0, -12, "center", "top"), (12, 0, "left", "center")]
    near += [(12, -8, "left", "top"), (-8, -10, "right", "top"), (-8, 10, "right", "bottom")]
    return [(x, y, dx * far, dy * far, ha, va) for far in (1, 2, 3, 5) for dx, dy, ha, va in near]


def _ends(axes: Axes, line: Any) -> list[tuple[float, float]]:
    """Points of a line in data; a horizontal reference spans the axes."""
    y = [float(value) for value in line.get_ydata()]
    x = list(axes.get_xlim()) if line.get_label() == DENSE else [float(value) for value in line.get_xdata()]
    return list(zip(x, y, strict=True))


def _along(points: Any, step: float = 5.0) -> list[tuple[float, float]]:
    """Points every `step` pixels along a polyline."""
    found = [(float(x), float(y)) for x, y in points]
    for (x0, y0), (x1, y1) in pairwise(tuple(found)):
        parts = max(1, math.ceil(math.hypot(x1 - x0, y1 - y0) / step))
        found += [(x0 + (x1 - x0) * i / parts, y0 + (y1 - y0) * i / parts) for i in range(1, parts)]
    return found
