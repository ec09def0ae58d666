"""The smallest tolerated drop whose ratios leave no more of a model than a budget allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_prune.errors import PlanError
from lightning_prune.graph import ChannelGraph
from lightning_prune.measure import CostModel
from lightning_prune.plan import Plan
from lightning_prune.selection import LayerRatio
from lightning_prune.selection.base import is_number
from lightning_prune.sensitivity.curves import Sensitivity


@dataclass(frozen=True)
class Tolerated:
    """What a budget comes to.

    Attributes:
        drop: tolerated of every group alone.
        selection: the ratios that it allows.
        remains: shares of the dense model that remain: ``flops`` (multiply-accumulates) and ``params``.
    """

    drop: float
    selection: LayerRatio
    remains: Mapping[str, float]


def within_budget(
    sensitivity: Sensitivity,
    model: nn.Module,
    graph: ChannelGraph,
    scores: Mapping[str, Tensor],
    example_inputs: Any,
    *,
    flops: float | None = None,
    params: float | None = None,
    **constraints: Any,
) -> Tolerated:
    """Ratios of layers that meet a budget by tolerating the same drop of every group: the smallest that is enough.

    Ratios are those that were measured, so that the budget is met in their steps; finer ratios meet it closer.

    Args:
        sensitivity: from `measure_sensitivity`.
        model: the same.
        graph: its channel graph.
        scores: that it was measured with.
        example_inputs: as for `lightning_prune.trace`.
        flops: share of the dense multiply-accumulates that may remain, in (0, 1).
        params: share of the dense parameters that may remain, in (0, 1); with ``flops`` both hold.
        constraints: as it was measured with.

    Raises:
        PlanError: no budget, one outside (0, 1), or one that the largest measured ratios do not meet.

    Example:
        >>> import torch, lightning_prune as lp
        >>> from lightning_prune.sensitivity import Point
        >>> model, images = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)), torch.zeros(1, 3, 8, 8)
        >>> graph = lp.trace(model, images)
        >>> curves = Sensitivity(0.9, (Point("0", 0.25, 2, 0.89), Point("0", 0.5, 4, 0.85)), {"0": 8})
        >>> found = within_budget(curves, model, graph, lp.score(model, graph, "l1"), images, flops=0.8)
        >>> found.selection.overrides, found.remains["flops"]
        ({'0': 0.25}, 0.75)
    """
    asked = {name: share for name, share in (("flops", flops), ("params", params)) if share is not None}
    if not asked or not all(is_number(share) and 0 < share < 1 for share in asked.values()):
        raise PlanError(f"a budget of sensitivities is flops= or params=, a share in (0, 1) that remains; got {asked}")
    costs = CostModel(model, graph, example_inputs)

    def at(drop: float) -> Tolerated:
        selection = sensitivity.layer_ratio(drop, **constraints)
        plan = selection.select(graph, scores) if any(selection.overrides.values()) else Plan({})
        left_params, left_macs = costs.of(plan)
        return Tolerated(
            drop, selection, {"flops": left_macs / (costs.macs or 1), "params": left_params / costs.params}
        )

    def meets(found: Tolerated) -> bool:
        return all(found.remains[name] <= share for name, share in asked.items())

    drops = sorted({max(0.0, sensitivity.drop(point)) for point in sensitivity.points})
    low, high = 0, len(drops) - 1
    last = at(drops[high])
    if not meets(last):
        remain = ", ".join(f"{name}={last.remains[name]:.3f}" for name in asked)
        raise PlanError(f"the largest measured ratios leave {remain}: measure larger ones, or allow more to remain")
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(at(drops[middle])) else (middle + 1, high)
    return at(drops[low])
