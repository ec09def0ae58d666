"""The two pictures of the report."""

from __future__ import annotations

from pathlib import Path
from statistics import median

from benchmarks.library_speed.report import HEAVY, MEDIAN, WORST, fitted, ratios
from benchmarks.zoo.runner import Row

COLORS = {"cnn": "#2166ac", "hybrid": "#762a83", "transformer": "#b35806", "mlp": "#1b7837", "other": "#666666"}


def beside_peer(rows: list[Row], path: Path) -> None:
    """The ratio of every model, largest at the top; nothing without rows."""
    found = ratios(rows)
    if not found:
        return
    from matplotlib.figure import Figure

    kinds = {row["key"]: row["kind"] for row in rows if "kind" in row}
    figure = Figure(figsize=(8, 1.2 + 0.16 * len(found)), layout="constrained")
    axes = figure.subplots()
    axes.hlines(range(len(found)), MEDIAN, list(found.values()), color="#cccccc", lw=1, zorder=1)
    axes.scatter(list(found.values()), range(len(found)), s=18, c=[COLORS[kinds[key]] for key in found], zorder=2)
    axes.axvline(MEDIAN, color="black", lw=0.8)
    axes.axvline(WORST, color="#b2182b", lw=0.8, ls="--")
    axes.axvline(median(found.values()), color="#2166ac", lw=0.8, ls=":")
    axes.set_yticks(range(len(found)), [key.partition("/")[2] for key in found], fontsize=6)
    axes.set(xscale="log", ylim=(-1, len(found)), xlabel="our seconds over Torch-Pruning's")
    ticks = [tick for tick in (0.1, 0.25, 0.5, 1, 1.5, 2, 3, 5) if tick <= 1.2 * max(*found.values(), WORST)]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_title("Trace + score + select + reconstruct; dotted: median, dashed: the limit", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def by_operators(rows: list[Row], path: Path) -> None:
    """Seconds of a trace against operators of a forward, both as logarithms; nothing without rows."""
    traced = [row for row in rows if row["outcome"] == "traced"]
    if len(traced) < 2:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for kind, color in COLORS.items():
        chosen = [row for row in traced if row["kind"] == kind]
        if not chosen:
            continue
        x, y = [row["operators"] for row in chosen], [row["trace"] for row in chosen]
        axes.scatter(x, y, s=14, color=color, alpha=0.7, label=f"{kind} ({len(chosen)})")
    ends = [choose(row["operators"] for row in traced) for choose in (min, max)]
    slope, start = fitted(traced)
    linear = median(row["trace"] / row["operators"] for row in traced)
    axes.plot(ends, [linear * count for count in ends], color="black", lw=0.8, label="slope 1")
    label = f"fitted: slope {slope:.2f}"
    axes.plot(ends, [start * count**slope for count in ends], color="black", lw=0.8, ls=":", label=label)
    axes.axhline(HEAVY, color="#b2182b", lw=0.8, ls="--", label=f"{HEAVY:g} s")
    axes.set(xscale="log", yscale="log", xlabel="ATen operators of a forward", ylabel="seconds of a trace, one thread")
    axes.legend(fontsize=8, frameon=False)
    axes.grid(alpha=0.3, lw=0.6)
    figure.savefig(path, dpi=130)
