"""Pictures of a reproduction: what pruning costs at what is left, losses, ROC curves, orders A and B against time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle
from statistics import median
from typing import TYPE_CHECKING, Any

from lightning_prune.experiments.comparison.picture import COLORS, MARKERS
from lightning_prune.experiments.reproduce.channel_pictures import maps_figure, rounds_figure
from lightning_prune.experiments.runner import metric_name
from lightning_prune.report.figures import DPI, WIDTH, Palette, add_title, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_prune.experiments.reproduce.cells import Cell
    from lightning_prune.experiments.reproduce.recipe import Row
    from lightning_prune.experiments.reproduce.run import Reproduction

NAMES = {"random": "random (published as GM)", "fpgm": "FPGM", "thinet": "ThiNet"}
FAR = 30  # times the median loss
LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 9}


@dataclass(frozen=True)
class Picture:
    """One picture: the name of its file, what it shows in words, and what draws it."""

    name: str
    alt: str
    draw: Callable[[], Figure]


def pictures(found: Reproduction) -> Iterator[Picture]:
    """Those of the recipe for which there is something to draw."""
    for name in found.recipe.pictures:
        applies, draw, alt = PICTURES[name]
        if any(applies(cell) for cell in found.cells):
            yield Picture(name, alt, lambda draw=draw: draw(found))  # type: ignore[misc]


def criterion_name(found: Reproduction, row: Row) -> str:
    """What a legend calls the criterion of a row."""
    given = found.recipe.pruning(row, found.scale).criterion
    name = given if isinstance(given, str) else given["class_path"].rpartition(".")[2] if given else "dense"
    return NAMES.get(name, name.upper() if len(name) < 4 else name)


def tradeoff_figure(found: Reproduction) -> Figure:
    """Change against the dense model over the FLOPs that are left: filled ours, hollow the paper's."""
    from matplotlib.figure import Figure

    recipe = found.recipe
    rows = [row for row in recipe.rows if not row.dense]
    names = list(dict.fromkeys(criterion_name(found, row) for row in rows))
    colors, markers = dict(zip(names, cycle(COLORS))), dict(zip(names, cycle(MARKERS)))
    with styled("light") as palette:
        figure = Figure(figsize=(WIDTH, 4.6), dpi=DPI)
        axes = figure.add_axes((0.09, 0.12, 0.86, 0.63))
        for row in rows:
            name = criterion_name(found, row)
            look: dict[str, Any] = {"color": colors[name], "marker": markers[name], "ms": 7, "ls": "", "zorder": 3}
            cells = [c for c in found.of(row) if "change" in c.values]
            for cell in cells:
                axes.plot(cell.values["left"], cell.values["change"], label=name, mec=palette.paper, mew=0.5, **look)
            paper = recipe.published(row)
            if {"left", "change"} <= set(paper):
                label = None if cells else name
                axes.plot(paper["left"], paper["change"], mfc="none", mew=1.3, alpha=0.6, label=label, **look)
        axes.axhline(0, color=palette.quiet, lw=1.0, ls=(0, (5, 3)), zorder=1)
        _finish(axes, palette, "FLOPs left (% of dense)")
        handles, labels = axes.get_legend_handles_labels()
        once = dict(zip(labels, handles, strict=True))
        place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.09, 1.02), "ncols": 5}
        axes.legend(once.values(), once.keys(), **LEGEND, **place)
        what = f"Change of {metric_name(recipe.metrics[0])} against the dense model (points)"
        add_title(figure, palette, what, f"filled: here ({found.name}), hollow: {recipe.paper}, {recipe.item}")
    return figure


def losses_figure(found: Reproduction) -> Figure:
    """Losses over the epochs, a panel per row."""
    from matplotlib.figure import Figure

    cells = [cell for cell in found.cells if _has_losses(cell)]
    with styled("light") as palette:
        figure = Figure(figsize=(WIDTH, 3.9), dpi=DPI)
        grid = {"left": 0.08, "right": 0.97, "top": 0.74, "bottom": 0.14, "wspace": 0.2}
        panels = figure.subplots(1, len(cells), squeeze=False, gridspec_kw=grid)[0]
        for axes, cell in zip(panels, cells, strict=True):
            for key, label, order in (("train_loss", "training", "B"), ("val_loss", "validation", "A")):
                points = [(one["epoch"] + 1, one[key]) for one in cell.curve if key in one]
                marker = "o" if len(points) < 30 else None
                look: dict[str, Any] = {"color": palette.orders[order], "marker": marker, "ms": 4, "lw": 1.6}
                axes.plot(*zip(*points, strict=True), label=label, **look)
            axes.set_title(cell.row, loc="left", size=10, color=palette.ink)
            losses = [one[key] for one in cell.curve for key in ("train_loss", "val_loss") if key in one]
            if max(losses) > FAR * median(losses):
                axes.set_yscale("log")  # a first validation may be off by orders of magnitude
            else:
                axes.set_ylim(bottom=0)
            axes.xaxis.get_major_locator().set_params(integer=True)
            _finish(axes, palette, "epoch")
            axes.legend(**LEGEND)
        add_title(figure, palette, "Loss against epochs", f"{found.recipe.item}, {found.name} scale")
    return figure


def roc_figure(found: Reproduction) -> Figure:
    """One class against the rest, a panel per row."""
    from matplotlib.figure import Figure

    cells = [cell for cell in found.cells if "roc" in cell.more]
    with styled("light") as palette:
        figure = Figure(figsize=(WIDTH, 4.6), dpi=DPI)
        grid = {"left": 0.08, "right": 0.97, "top": 0.78, "bottom": 0.12, "wspace": 0.2}
        panels = figure.subplots(1, len(cells), squeeze=False, gridspec_kw=grid)[0]
        for axes, cell in zip(panels, cells, strict=True):
            roc, places = cell.more["roc"], cycle(COLORS)
            for number, (fpr, tpr) in enumerate(zip(roc["fpr"], roc["tpr"], strict=True)):
                name, style = cell.more["classes"][number], "-" if number < len(COLORS) else "--"
                label = f"{name} {roc['auc'][number]:.4f}"
                axes.plot(fpr, tpr, color=next(places), lw=1.2, ls=style, label=label)
            axes.plot([0, 1], [0, 1], color=palette.track, lw=0.8)
            axes.set_title(cell.row, loc="left", size=10, color=palette.ink)
            _finish(axes, palette, "false positive rate")
            axes.set_ylabel("true positive rate")
            axes.legend(**{**LEGEND, "fontsize": 8}, loc="lower right", title="area", title_fontsize=8)
        add_title(figure, palette, "ROC, each class against the rest", f"test part; {found.recipe.item}")
    return figure


def orders_figure(found: Reproduction) -> Figure:
    """The metric against time in both orders, a panel per ratio."""
    from matplotlib.figure import Figure

    recipe = found.recipe
    by_ratio: dict[float, dict[str, Cell]] = {}
    for row in found.rows:
        how = recipe.pruning(row, found.scale)
        if not row.dense and found.of(row):
            by_ratio.setdefault(how.ratio, {})[how.order] = found.of(row)[0]
    with styled("light") as palette:
        figure = Figure(figsize=(10, 3.8), dpi=DPI)
        grid = {"left": 0.065, "right": 0.985, "top": 0.72, "bottom": 0.14, "wspace": 0.08}
        panels = figure.subplots(1, len(by_ratio), squeeze=False, sharey=True, gridspec_kw=grid)[0]
        for axes, (ratio, cells) in zip(panels, by_ratio.items(), strict=True):
            for order, cell in sorted(cells.items()):
                points = [(e["elapsed_seconds"], 100 * e["accuracy"]) for e in cell.curve if e["accuracy"] is not None]
                label = f"order {order}: {points[-1][0]:.0f} s"
                marker = {"A": "s", "B": "o"}[order]
                axes.plot(*zip(*points, strict=True), color=palette.orders[order], marker=marker, ms=5, label=label)
            axes.set_title(f"{ratio:.0%} of every layer removed", loc="left", size=10, color=palette.ink)
            axes.set_xlim(left=0)
            _finish(axes, palette, "seconds since the start of pruning")
            axes.legend(**LEGEND, loc="best")
        what = f"Validation {metric_name(recipe.metrics[0])} against time (%)"
        said = "A: prune, fine-tune, reconstruct; B: prune, reconstruct, fine-tune; a marker per epoch"
        add_title(figure, palette, what, said)
    return figure


def _finish(axes: Axes, palette: Palette, xlabel: str) -> None:
    axes.set_xlabel(xlabel)
    axes.grid(color=palette.track, lw=0.6, alpha=0.5)
    axes.spines["left"].set_visible(False)
    axes.tick_params(length=0, colors=palette.quiet)


def _has_losses(cell: Cell) -> bool:
    return any("train_loss" in one for one in cell.curve)


def _has_times(cell: Cell) -> bool:
    return any(one.get("accuracy") is not None for one in cell.curve)


#: By name in a recipe: which cells have something to draw, what draws, what it shows.
PICTURES: Mapping[str, tuple[Callable[[Cell], bool], Callable[[Reproduction], Figure], str]] = {
    "tradeoff": (lambda cell: "change" in cell.values, tradeoff_figure, "change against FLOPs left"),
    "losses": (_has_losses, losses_figure, "loss against epochs"),
    "roc": (lambda cell: "roc" in cell.more, roc_figure, "ROC curves, each class against the rest"),
    "orders": (_has_times, orders_figure, "orders A and B against time"),
    "maps": (lambda cell: "maps" in cell.more, maps_figure, "feature maps removed and kept"),
    "rounds": (lambda cell: "rounds" in cell.more, rounds_figure, "accuracy against channels left"),
}
