"""Pictures of single channels: maps that are removed and kept; accuracy while channels go, round by round."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING, Any

from lightning_prune.experiments.comparison.picture import COLORS, MARKERS
from lightning_prune.report.figures import DPI, WIDTH, add_title, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lightning_prune.experiments.reproduce.run import Reproduction

FATES = {"removed": "removed first", "kept": "kept, strongest"}


def maps_figure(found: Reproduction) -> Figure:
    """The image, and maps of one layer on it: a row of removed ones, a row of kept ones, on one grey scale."""
    from matplotlib.figure import Figure

    cell = next(cell for cell in found.cells if "maps" in cell.more)
    maps = cell.more["maps"]
    values = [value for one in maps for line in one["map"] for value in line]
    scale: dict[str, Any] = {"vmin": min(values), "vmax": max(values), "cmap": "gray", "interpolation": "nearest"}
    with styled("light") as palette:
        figure = Figure(figsize=(WIDTH, 5.3), dpi=DPI)
        panels = figure.subplots(
            2, 4, gridspec_kw={"left": 0.02, "right": 0.98, "top": 0.78, "bottom": 0.02, "hspace": 0.25, "wspace": 0.06}
        )
        for axes in panels.flat:
            axes.axis("off")
        planes = list(zip(*cell.more["image"], strict=True))  # (H) of (C, W)
        image = [[list(pixel) for pixel in zip(*line, strict=True)] for line in planes]
        if len(image[0][0]) == 1:
            panels[0, 0].imshow([[pixel[0] for pixel in line] for line in image], cmap="gray")
        else:
            panels[0, 0].imshow(image)
        panels[0, 0].set_title("image", size=9, loc="left")
        for line, fate in enumerate(FATES):
            shown = [one for one in maps if one["fate"] == fate]
            for axes, one in zip(panels[line, 1:], shown, strict=False):
                axes.imshow(one["map"], **scale)
                said = f"channel {one['channel']}, {FATES[fate]}\nscore {one['score']:.3f}"
                axes.set_title(said, size=9, loc="left", color=palette.orders["A" if fate == "removed" else "B"])
        add_title(figure, palette, f"Output maps of {cell.row}", "one test image; all maps on one grey scale")
    return figure


def rounds_figure(found: Reproduction) -> Figure:
    """Accuracy against the channels that are left, right after every removal and after fine-tuning."""
    from matplotlib.figure import Figure

    rows = [row for row in found.rows if any("rounds" in cell.more for cell in found.of(row))]
    looks = {row.label: look for row, look in zip(rows, zip(cycle(COLORS), cycle(MARKERS)))}  # noqa: B905
    with styled("light") as palette:
        figure = Figure(figsize=(11, 4.6), dpi=DPI)
        grid = {"left": 0.055, "right": 0.985, "top": 0.77, "bottom": 0.12, "wspace": 0.1}
        panels = figure.subplots(1, 2, sharey=True, gridspec_kw=grid)
        for axes, (when, title) in zip(
            panels, {"before": "right after a removal", "after": "after fine-tuning"}.items(), strict=True
        ):
            for row in rows:
                color, marker = looks[row.label]
                for number, cell in enumerate(found.of(row)):
                    points = [(one["share"], one[when]) for one in cell.more["rounds"] if when in one]
                    label = row.label if not number else None
                    look: dict[str, Any] = {"color": color, "marker": marker, "ms": 3.5, "lw": 1.2, "label": label}
                    axes.plot(*zip(*points, strict=True), alpha=0.9, **look)
            if when == "after":
                _published(axes, found, palette.ink)
            axes.set_title(title, loc="left", size=10, color=palette.ink)
            axes.set_xlabel("channels of convolutions left (%)")
            axes.invert_xaxis()
            axes.grid(color=palette.track, lw=0.6, alpha=0.5)
            axes.spines["left"].set_visible(False)
            axes.tick_params(length=0, colors=palette.quiet)
        panels[1].legend(frameon=False, fontsize=9, loc="lower left")
        said = f"{found.recipe.paper}; {found.name} scale, {sum(map(len, map(found.of, rows)))} runs"
        add_title(figure, palette, "Accuracy against channels left (%)", said)
    return figure


def _published(axes: Axes, found: Reproduction, color: str) -> None:
    """The paper's own curve, as far as it is known."""
    for row in found.recipe.rows:
        points = [(float(key[3:]), value) for key, value in row.published.items() if key.startswith("at_")]
        if points:
            label = f"{row.label}, published"
            axes.plot(*zip(*points, strict=True), ls="", marker="x", ms=6, mew=1.5, color=color, label=label, zorder=4)
