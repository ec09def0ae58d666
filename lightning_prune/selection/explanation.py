"""What a plan would do to a model, group by group, said before anything is done."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lightning_prune.graph import ChannelGraph, Group
from lightning_prune.graph.describe import percent, shortened
from lightning_prune.measure import CostModel, count_flops, count_params
from lightning_prune.plan import GroupPlan, Plan
from lightning_prune.reconstruction.small_model import reconstruct
from lightning_prune.selection.search import Reach
from lightning_prune.selection.table_choice import TableChoice

HEAD = ("group", "channels", "kept", "params saved", "MACs saved")


@dataclass(frozen=True)
class GroupExplanation:
    """What a plan does to one group.

    Attributes:
        name: of the group.
        channels: of the dense model.
        kept: that the reconstructed model has.
        params_saved: parameters that come back if only this group is left whole. A weight between two groups that both
            lose channels is saved by both of them together, so the column does not add up to the total.
        macs_saved: multiply-accumulates per sample, likewise.
        note: why nothing goes, or what else there is to know; may be empty.
    """

    name: str
    channels: int
    kept: int
    params_saved: int
    macs_saved: int
    note: str


@dataclass(frozen=True)
class Explanation:
    """A plan in words; ``str`` tabulates it.

    Attributes:
        groups: every group of the graph, in the order the model runs.
        params: of the dense and of the reconstructed model, frozen ones included.
        macs: multiply-accumulates per sample of both.
        lossless: whether the reconstructed model equals the masked one by construction.
        reach: whether a budget can be met at all, if one was asked about, or how well a latency table met it.
    """

    groups: tuple[GroupExplanation, ...]
    params: tuple[int, int]
    macs: tuple[int, int]
    lossless: bool
    reach: Reach | TableChoice | None = None

    def __str__(self) -> str:
        rows = [
            (g.name, *(f"{number:,}" for number in (g.channels, g.kept, g.params_saved, g.macs_saved)))
            for g in self.groups
        ]
        lines = [*_aligned(rows), "saved: what comes back if that group alone is left whole; they do not add up", ""]
        notes = dict.fromkeys(g.note for g in self.groups if g.note)
        lines += [f"{', '.join(g.name for g in self.groups if g.note == note)}: {note}" for note in notes]
        lines += [""] if notes else []
        channels = sum(g.channels for g in self.groups), sum(g.kept for g in self.groups)
        for name, (before, after) in {"channels": channels, "params": self.params, "MACs": self.macs}.items():
            lines.append(f"{name}: {after:,} of {before:,} remain ({percent(after, before)})")
        lines.append("lossless: " + ("yes, by construction" if self.lossless else "NO, by choice of the plan"))
        return "\n".join([*lines, *([str(self.reach)] if self.reach else ())])


def explain(
    model: nn.Module,
    graph: ChannelGraph,
    plan: Plan,
    example_inputs: Any,
    *,
    reach: Reach | TableChoice | None = None,
) -> Explanation:
    """Say what a plan would do; the model is left as it is.

    The totals are counted on a reconstructed copy, the savings of the groups follow from shapes, see
    `lightning_prune.measure.CostModel`.

    Args:
        model: the traced model.
        graph: from `lightning_prune.trace`.
        plan: from `Selection.select`, or loaded.
        example_inputs: as for `lightning_prune.trace`.
        reach: from `Budget.reach` or `Budget.by_table`, to be told along.

    Raises:
        PlanError: the plan or the graph does not belong to this model.
        TraceError: the model, or the reconstructed one, does not run on the inputs.

    Example:
        >>> import torch, lightning_prune as lp
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> images = torch.zeros(1, 3, 8, 8)
        >>> graph = lp.trace(model, images)
        >>> plan = lp.LayerRatio(0.5).select(graph, lp.score(model, graph, "l1"))
        >>> print(explain(model, graph, plan, images))
        group  channels  kept  params saved  MACs saved
        -----  --------  ----  ------------  ----------
        0             8     4           128       4,464
        2             4     4             0           0
        saved: what comes back if that group alone is left whole; they do not add up
        <BLANKLINE>
        2: not prunable: reaches the model's output
        <BLANKLINE>
        channels: 8 of 12 remain (67 %)
        params: 132 of 260 remain (51 %)
        MACs: 4,464 of 8,928 remain (50 %)
        lossless: yes, by construction
    """
    plan.check(graph)
    cost = CostModel(model, graph, example_inputs)
    small = reconstruct(model, graph, plan)
    left = cost.of(plan)
    groups = []
    for group in graph.groups:
        planned = plan.groups.get(group.name)
        others = replace(plan, groups={name: of for name, of in plan.groups.items() if name != group.name})
        params, macs = cost.of(others) if planned and planned.removed else left
        kept = len(planned.keep) if planned else group.size
        saved = params - left[0], macs - left[1]
        groups.append(GroupExplanation(group.name, group.size, kept, *saved, _note(group, planned)))
    return Explanation(
        tuple(groups),
        (cost.params, count_params(small, trainable=False)),
        (cost.macs, count_flops(small, example_inputs)),
        plan.lossless and not any(graph.group(name).statistics and g.removed for name, g in plan.groups.items()),
        reach,
    )


def _note(group: Group, planned: GroupPlan | None) -> str:
    if group.reason is not None:
        return f"not prunable: {group.reason}"
    if planned is None:
        return "not in the plan: ignored, or no candidate"
    notes = []
    if not planned.removed:
        notes.append("keeps all its channels")
    if group.statistics and planned.removed:
        notes.append(f"with loss: {group.statistics}")
    kept = set(planned.keep)
    zero = sum(len(kept - set(own)) for own in planned.layers.values())
    if zero:
        notes.append(f"{zero:,} zero filters stay for an addition")
    others = [layer.name for layer in group.layers[1:]]  # the first one is the group's name
    if others:
        notes.append(f"together with {shortened(others)}")
    return "; ".join(notes)


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of a table under `HEAD` and a rule: the name to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(HEAD, *rows, strict=True)]
    lines = (HEAD, tuple("-" * width for width in widths), *rows)
    return ["  ".join([name.ljust(widths[0]), *map(str.rjust, numbers, widths[1:])]) for name, *numbers in lines]
