"""Pictures: channels kept per layer, and accuracy against time in both orders of fine-tuning.

Matplotlib is imported when a picture is drawn; no backend is chosen, no style is left behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from lightning_prune.errors import PruningError
from lightning_prune.files import atomic
from lightning_prune.report.data import DENSE, KeptChannels, OrderTiming
from lightning_prune.report.summary import capitalized
from lightning_prune.report.table import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
    from matplotlib import style

    palette = PALETTES[theme]
    ours: dict[str, Any] = {
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
    with style.context(["default", ours]):
        yield palette


def channels_figure(layers: Sequence[KeptChannels], theme: Theme = "light") -> Figure:
    """Draw a bar per layer, from top to bottom: the outline is the dense layer, the filled part what was kept."""
    if not layers:
        raise PruningError("the report names no layers, so there are no channels to draw")
    names, kept, dense = zip(*((layer.layer, layer.kept, layer.dense) for layer in layers), strict=True)
    total = f"{sum(kept):,} of {sum(dense):,} in all ({100 * sum(kept) / max(sum(dense), 1):.0f} %)"
    said = f"filled: kept, outline: dense; {total}"
    with styled(theme) as palette:
        figure, axes, size = figure_of_rows(names, palette, "Channels kept per layer", said, bottom=0.3, right=0.75)
        axes.set_xlim(0, max(dense) * 1.2)
        for start, end in bands(names)[1::2]:
            # from the names' left edge to the paper's right one
            axes.axhspan(start - 0.5, end + 0.5, xmin=-5, xmax=5, color=palette.band, lw=0, zorder=0, clip_on=False)
        at = range(len(layers))
        bars = axes.barh(at, dense, 0.62, fc=palette.paper, ec=palette.track, lw=0.9, zorder=2)
        axes.barh(at, kept, 0.62, color=palette.orders["B"], lw=0, zorder=3)
        counts = [f"{one.kept} of {one.dense}" if one.kept < one.dense else f"all {one.dense}" for one in layers]
        axes.bar_label(bars, counts, padding=5, size=size)
        margin: dict[str, Any] = {"ha": "right", "color": palette.quiet, "size": size, "textcoords": "offset points"}
        for row, layer in enumerate(layers):
            share = f"{100 * layer.kept / max(layer.dense, 1):.0f} %"
            axes.annotate(share, (1, row), (44, 0), ("axes fraction", "data"), va="center", **margin)
        axes.annotate("kept", (1, 1), (44, 5), "axes fraction", va="bottom", **margin)
        axes.tick_params(axis="x", length=0)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
    return figure


def figure_of_rows(
    names: Sequence[str],
    palette: Palette,
    title: str,
    subtitle: str,
    *,
    bottom: float,
    right: float,
    top: float = 0.85,
) -> tuple[Figure, Axes, int]:
    """A figure with a row per layer, its axes, and the size of text; margins in inches."""
    from matplotlib.figure import Figure

    rows = len(names)
    pitch, size = (0.28, 9) if rows <= 24 else (0.22, 8)  # inches a row, points of text
    height = top + rows * pitch + bottom
    shown = [shorten(name) for name in names]
    left = 0.35 + max(map(len, shown)) * size * 0.62 / 72  # a character of DejaVu Sans is about 0.6 of its size
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    axes = figure.add_axes((left / WIDTH, bottom / height, 1 - (left + right) / WIDTH, rows * pitch / height))
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_yticks(range(rows), shown, size=size)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    add_title(figure, palette, title, subtitle)
    return figure, axes, size


def accuracy_time_figure(
    timings: Sequence[OrderTiming], theme: Theme = "light", *, dense: float | None = None, metric: str = "accuracy"
) -> Figure:
    """Draw accuracy against time since the start of pruning: a line per order, the dense model as reference."""
    curves = {
        timing.order: [(e.elapsed_seconds, 100 * e.accuracy) for e in timing.epochs if e.accuracy is not None]
        for timing in timings
    }
    curves = {order: curve for order, curve in sorted(curves.items()) if curve}
    if not curves:
        raise PruningError("the report has no epoch with an accuracy, so there is nothing to draw against time")
    from matplotlib.figure import Figure

    longest = max(curve[-1][0] for curve in curves.values())
    unit, divisor = ("s", 1) if longest < 600 else ("min", 60) if longest < 3 * 3600 else ("h", 3600)
    what = {"A": "A: fine-tune, then reconstruct", "B": "B: reconstruct, then fine-tune"}
    said = "validation, a marker per epoch; " + "; ".join(what[order] for order in curves)
    with styled(theme) as palette:
        figure = Figure(figsize=(WIDTH, 4.4), dpi=DPI)
        axes = figure.add_axes((0.085, 0.125, 0.875, 0.635))
        add_title(figure, palette, f"{capitalized(metric)} against time (%)", said)
        for order, curve in curves.items():
            x, y = [t / divisor for t, _ in curve], [a for _, a in curve]
            look: dict[str, Any] = {"color": palette.orders[order], "marker": MARKERS[order]}
            label = f"order {order}: {y[-1]:.2f} % after {x[-1]:.{1 if x[-1] < 10 else 0}f} {unit}"
            axes.plot(x, y, lw=2, ms=6, mfc=palette.paper, mew=1.6, zorder=3, label=label, **look)
            axes.plot(x[-1:], y[-1:], ms=7, zorder=4, **look)
        if dense is not None:
            label = f"{DENSE}: {100 * dense:.2f} %"
            axes.axhline(100 * dense, color=palette.quiet, lw=1.2, ls=(0, (5, 3)), zorder=1, label=label)
        axes.set_xlim(0, 1.04 * longest / divisor)
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, high - 1), max(high, low + 1))
        axes.set_yticks([tick for tick in axes.get_yticks() if max(low, 0) <= tick <= 100])
        axes.grid(axis="y", color=palette.track, lw=0.6, alpha=0.5)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0, colors=palette.quiet)
        axes.set_xlabel(f"wall-clock time since the start of pruning ({unit})")
        # a line above the axes, where no curve can be
        colors = [*(palette.orders[order] for order in curves), palette.quiet][: len(curves) + (dense is not None)]
        place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.085, 1.02), "frameon": False}
        axes.legend(ncols=3, labelcolor=colors, handletextpad=0.5, columnspacing=1.6, fontsize=9.5, **place)
    return figure


def save_figure(figure: Figure, target: Path | IO[bytes], kind: Literal["png", "svg"] = "png") -> None:
    """Write a figure; to a path as a whole or not at all, the same data as the same bytes."""
    metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {"Software": None}
    with styled("light"), atomic(target) if isinstance(target, Path) else nullcontext(target) as stream:
        figure.savefig(stream, format=kind, dpi=DPI, facecolor=figure.get_facecolor(), metadata=metadata)


def bands(layers: Sequence[str]) -> list[tuple[int, int]]:
    """First and last row of every stage: consecutive layers whose names share the beginning up to a number."""
    stages = (list(block) for _, block in groupby(range(len(layers)), lambda row: _stage(layers[row])))
    return [(rows[0], rows[-1]) for rows in stages]


def _stage(layer: str) -> str:
    parts = layer.split(".")
    numbered = (number for number, part in enumerate(parts[:-1], 1) if part[-1:].isdigit())
    return ".".join(parts[: next(numbered, 1)])


def add_title(figure: Figure, palette: Palette, title: str, subtitle: str) -> None:
    """Write a heading and what explains it into the top left corner."""
    height = figure.get_figheight()
    figure.text(0.18 / WIDTH, 1 - 0.2 / height, title, size=13, weight="bold", va="top")
    figure.text(0.18 / WIDTH, 1 - 0.48 / height, subtitle, size=9.5, color=palette.quiet, va="top")
