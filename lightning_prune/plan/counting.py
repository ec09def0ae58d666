"""How much a plan masks."""

from __future__ import annotations

from lightning_prune.graph import ChannelGraph
from lightning_prune.plan.plan import Plan


def filters_masked(graph: ChannelGraph, plan: Plan) -> tuple[int, int]:
    """Filters of prunable layers that are masked or gone, and how many there are.

    Several filters of a layer may be one channel of its group, as under a group norm.
    """
    masked = total = 0
    for group in graph.prunable_groups:
        planned = plan.groups.get(group.name)
        for layer in group.layers:
            each = layer.index.numel() // group.size
            kept = group.size if planned is None else len(planned.kept_by(layer.name))
            total += group.size * each
            masked += (group.size - kept) * each
    return masked, total
