"""What a run shows of its pruning: channels per layer, scores, and tables that any logger can take."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_prune.criteria.scoring import Scores
from lightning_prune.errors import PruningError
from lightning_prune.graph import ChannelGraph
from lightning_prune.plan import GroupPlan, Plan
from lightning_prune.report.data import RECONSTRUCTED, LayerChannels, PruneReport
from lightning_prune.report.figures import figure_of_rows, styled
from lightning_prune.report.summary import stages_table
from lightning_prune.report.table import MISSING, Column, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def layer_channels(graph: ChannelGraph, plan: Plan | None, *, prefix: str = "") -> tuple[LayerChannels, ...]:
    """Filters of every layer before and after, in the order of the model's parameters.

    Args:
        graph: of the dense model.
        plan: in its channels; None: nothing is removed.
        prefix: of layer names that is left out.

    Example:
        >>> import torch, lightning_prune as lp
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> plan = lp.Plan({"0": lp.plan.GroupPlan(4, (0, 2, 3))})
        >>> [(layer.layer, layer.kept) for layer in layer_channels(lp.trace(model, torch.zeros(1, 1)), plan)]
        [('0', 3), ('2', 2)]
    """
    place = {tensor: number for number, tensor in enumerate(graph.shapes)}
    found = []
    for group in graph.groups:
        kept = None if plan is None else plan.groups.get(group.name)
        for layer in group.layers:
            count = layer.filters if kept is None else len(kept.keep) * layer.index.shape[1]
            name = layer.name.removeprefix(prefix)
            found.append((place[layer.weight], LayerChannels(name, layer.filters, count, group.name)))
    return tuple(channels for _, channels in sorted(found, key=itemgetter(0)))


def share_removed(graph: ChannelGraph, plan: Plan | None) -> float:
    """Share of all prunable layers' channels that are masked or gone, in [0, 1]."""
    total = sum(group.size * len(group.layers) for group in graph.prunable_groups)
    groups = {} if plan is None else plan.groups
    gone = sum(
        group.size - len(_kept(groups[group.name], layer.name))
        for group in graph.prunable_groups
        if group.name in groups
        for layer in group.layers
    )
    return gone / total if total else 0.0


def channels_table(layers: Sequence[LayerChannels]) -> Table:
    """A row per layer."""
    rows = ((layer.layer, layer.group, layer.dense, layer.kept, layer.kept / max(layer.dense, 1)) for layer in layers)
    return Table.of(("layer", "group", "dense", "kept", "share kept"), rows)


def summary_table(report: PruneReport) -> Table:
    """The report's table without the columns that nobody measured, and with the losslessness error."""
    table, found = stages_table(report), report.losslessness
    measured = [n for n in range(1, len(table.columns)) if any(str(row[n]) != MISSING for row in table.rows)]
    columns = [Column("model"), *(table.columns[n] for n in measured)]
    rows = [[row[0], *(row[n] for n in measured)] for row in table.rows]
    if found is not None:
        columns.append(Column("Error against masked", "relative"))
        for row in rows:
            row.append(f"{found.max_rel_error:.1e}" if row[0] == RECONSTRUCTED else MISSING)
    return Table(tuple(columns), tuple(map(tuple, rows)))


def scores_figure(scores: Scores, plan: Plan | None = None) -> Figure:
    """Draw a row per layer, with a stroke per channel at its score; those that a plan removes hang below the line.

    The scale is logarithmic where all scores are positive and the largest is more than 50 times their median.

    Args:
        scores: of every layer of every prunable group.
        plan: in the same channels; groups that it does not name keep all.

    Raises:
        PruningError: there are no scores, or the plan is for other numbers of channels.
    """
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
            axes.set_xscale("log")
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
    kept = set(range(len(values)) if chosen is None else _kept(chosen, layer))
    scores = values.tolist()
    return [v for n, v in enumerate(scores) if n in kept], [v for n, v in enumerate(scores) if n not in kept]


def _kept(plan: GroupPlan, layer: str) -> tuple[int, ...]:
    return plan.layers.get(layer, plan.keep)
