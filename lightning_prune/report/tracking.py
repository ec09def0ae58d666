"""What a run shows of its pruning: channels per layer, scores, and tables that any logger can take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from lightning_prune.criteria.scoring import Scores
from lightning_prune.errors import PruningError
from lightning_prune.graph import ChannelGraph
from lightning_prune.plan import GroupPlan, Plan
from lightning_prune.report import RECONSTRUCTED, LayerChannels, PruneReport
from lightning_prune.report.figures import DPI, WIDTH, add_title, shorten, styled
from lightning_prune.report.table import MISSING, columns

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Table:
    """Columns by name, and rows of text and numbers.

    Example:
        >>> print(Table(("layer", "kept"), (("conv1", 3),)).markdown())
        | layer | kept |
        | --- | --- |
        | conv1 | 3 |
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    def markdown(self) -> str:
        """The table for a page."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


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
    rows = [(layer.layer, layer.group, layer.dense, layer.kept, layer.kept / max(layer.dense, 1)) for layer in layers]
    return Table(("layer", "group", "dense", "kept", "share kept"), tuple(rows))


def summary_table(report: PruneReport) -> Table:
    """The report's table without the columns that nobody measured, and with the losslessness error."""
    shown = [column for column in columns(report) if any(cell.value != MISSING for cell in column.cells)]
    names = ["model", *(f"{column.title} ({column.unit})" for column in shown)]
    rows = [[stage.name, *(column.cells[row].text() for column in shown)] for row, stage in enumerate(report.stages)]
    found = report.losslessness
    if found is not None:
        names.append("Error against masked (relative)")
        for row in rows:
            row.append(f"{found.max_rel_error:.1e}" if row[0] == RECONSTRUCTED else MISSING)
    return Table(tuple(names), tuple(map(tuple, rows)))


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
    from matplotlib.figure import Figure

    count = len(rows)
    pitch, size = (0.3, 9) if count <= 24 else (0.23, 8)
    top, bottom = 0.85, 0.6
    height = top + count * pitch + bottom
    names = [shorten(layer) for _, layer, _ in rows]
    left = 0.35 + max(map(len, names)) * size * 0.62 / 72
    with styled("light") as palette:
        figure = Figure(figsize=(WIDTH, height), dpi=DPI)
        axes = figure.add_axes((left / WIDTH, bottom / height, 1 - (left + 0.3) / WIDTH, count * pitch / height))
        axes.set_ylim(count - 0.5, -0.5)
        everything = sorted(value for *_, values in rows for value in values.tolist())
        if everything[0] > 0 and everything[-1] > 50 * everything[len(everything) // 2]:
            axes.set_xscale("log")
        removed_in_all = 0
        for row, (group, layer, values) in enumerate(rows):
            group_plan = None if plan is None else plan.groups.get(group)
            if group_plan is not None and group_plan.size != len(values):
                raise PruningError(
                    f"group {group!r} has {len(values)} scores, and the plan is for {group_plan.size} channels"
                )
            kept = set(range(len(values)) if group_plan is None else _kept(group_plan, layer))
            above = [value for channel, value in enumerate(values.tolist()) if channel in kept]
            below = [value for channel, value in enumerate(values.tolist()) if channel not in kept]
            removed_in_all += len(below)
            opacity = max(0.25, min(0.8, 24 / len(values)))
            axes.axhline(row, color=palette.track, lw=0.6, zorder=1)
            axes.vlines(above, row - 0.38, row, color=palette.orders["B"], lw=1.1, alpha=opacity, zorder=3)
            axes.vlines(below, row, row + 0.38, color=palette.orders["A"], lw=1.1, alpha=opacity, zorder=3)
        axes.set_yticks(range(count), names, size=size)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("score")
        said = f"a stroke per channel, {len(everything):,} in all"
        if removed_in_all:
            said += f"; above the line: kept, below it: {removed_in_all:,} removed"
        add_title(figure, palette, "Scores per layer", said)
    return figure


def _kept(plan: GroupPlan, layer: str) -> tuple[int, ...]:
    return plan.layers.get(layer, plan.keep)
