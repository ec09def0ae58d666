"""What a run shows of its pruning: channels per layer, scores, and tables that any logger can take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_prune.criteria.scores import Scores
from lightning_prune.errors import PruningError
from lightning_prune.graph import ChannelGraph, Group, Layer
from lightning_prune.plan import Plan, filters_masked
from lightning_prune.report.data import RECONSTRUCTED, KeptChannels, PruneReport
from lightning_prune.report.figures import figure_of_rows, styled
from lightning_prune.report.summary import stages_table
from lightning_prune.report.table import MISSING, Column, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def layer_channels(graph: ChannelGraph, plan: Plan, *, prefix: str = "") -> tuple[KeptChannels, ...]:
    """Filters of every layer of the dense model and with the plan, in the order of the model's parameters."""
    place = {tensor: number for number, tensor in enumerate(graph.shapes)}
    layers: dict[str, Layer] = {}
    groups: dict[str, list[str]] = {}  # several where a layer is split or half of it is added to something
    gone: dict[str, set[int]] = {}
    for group, layer in sorted(_members(graph.groups), key=lambda member: place[member[1].weight]):
        layers[layer.name] = layer
        groups.setdefault(layer.name, []).append(group.name)
        kept = plan.groups.get(group.name)
        removed = [] if kept is None else list(kept.removed)
        gone.setdefault(layer.name, set()).update(layer.index[removed].flatten().tolist())
    return tuple(
        _layer_channels(layer, name.removeprefix(prefix), gone[name], ", ".join(groups[name]))
        for name, layer in layers.items()
    )


def _layer_channels(layer: Layer, name: str, gone: set[int], groups: str) -> KeptChannels:
    keep = tuple(number for number in range(layer.filters) if number not in gone)
    return KeptChannels(name, layer.filters, len(keep), groups, keep)


def share_removed(graph: ChannelGraph, plan: Plan) -> float:
    """Share of all prunable layers' filters that are masked or gone, in [0, 1]."""
    gone, total = filters_masked(graph, plan)
    return gone / total if total else 0.0


def channels_table(layers: Sequence[KeptChannels]) -> Table:
    """A row per layer."""
    rows = ((layer.layer, layer.group, layer.dense, layer.kept, layer.kept / max(layer.dense, 1)) for layer in layers)
    return Table.of(("layer", "group", "dense", "kept", "share kept"), rows)


def summary_table(report: PruneReport) -> Table:
    """The report's table with the losslessness error."""
    table, found = stages_table(report), report.losslessness
    names, *measured = zip(table.columns, *table.rows, strict=True)
    shown = [(Column("model"), *names[1:]), *measured]
    if found is not None:
        errors = (f"{found.max_rel_error:.1e}" if name == RECONSTRUCTED else MISSING for name in names[1:])
        shown.append((Column("Error against masked", "relative"), *errors))
    columns, *rows = zip(*shown, strict=True)
    return Table(columns, tuple(rows))


def scores_figure(scores: Scores, plan: Plan | None = None) -> Figure:
    """Draw a row per layer, with a stroke per channel at its score; those that a plan removes hang below the line."""
    rows = [(group, layer, values) for group, of in scores.layers.items() for layer, values in of.items()]
    if not rows:
        raise PruningError("there are no scores of layers, so there is nothing to draw")
    marks = [_marks(group, layer, values, plan) for group, layer, values in rows]
    everything = sorted(value for *_, values in rows for value in values.tolist())
    said = f"a stroke per channel, {len(everything):,} in all"
    if removed := sum(len(below) for _, below in marks):
        said += f"; above the line: kept, below it: {removed:,} removed"
    names = [layer for _, layer, _ in rows]
    with styled("light") as palette:
        figure, axes, _ = figure_of_rows(names, palette, "Scores per layer", said, bottom=0.6, right=0.3)
        if everything[0] > 0 and everything[-1] > 50 * everything[len(everything) // 2]:
            axes.set_xscale("log")  # the largest is far from the median
        for row, (above, below) in enumerate(marks):
            opacity = max(0.25, min(0.8, 24 / (len(above) + len(below))))
            axes.axhline(row, color=palette.track, lw=0.6, zorder=1)
            axes.vlines(above, row - 0.38, row, color=palette.orders["B"], lw=1.1, alpha=opacity, zorder=3)
            axes.vlines(below, row, row + 0.38, color=palette.orders["A"], lw=1.1, alpha=opacity, zorder=3)
        axes.set_xlabel("score")
    return figure


def _marks(group: str, layer: str, values: Tensor, plan: Plan | None) -> tuple[list[float], list[float]]:
    """Scores of the channels that are kept and of those that go."""
    chosen = None if plan is None else plan.groups.get(group)
    if chosen is not None and chosen.size != len(values):
        raise PruningError(f"group {group!r} has {len(values)} scores, and the plan is for {chosen.size} channels")
    kept = set(range(len(values)) if chosen is None else chosen.kept_by(layer))
    scores = values.tolist()
    return [v for n, v in enumerate(scores) if n in kept], [v for n, v in enumerate(scores) if n not in kept]


def _members(groups: Iterable[Group]) -> Iterator[tuple[Group, Layer]]:
    return ((group, layer) for group in groups for layer in group.layers)
