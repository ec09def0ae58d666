"""A metric over the share of masked channels, for every group alone, and the ratios that a tolerated drop allows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lightning_prune.errors import PlanError
from lightning_prune.selection import LayerRatio
from lightning_prune.selection.base import is_number
from lightning_prune.selection.layer_names import LayerName

Mode = Literal["max", "min"]


@dataclass(frozen=True)
class Point:
    """One group at one ratio.

    Attributes:
        group: its name.
        ratio: share that was asked for.
        removed: channels that were masked.
        value: the metric then; NaN where it was no finite number.
    """

    group: str
    ratio: float
    removed: int
    value: float


@dataclass(frozen=True)
class Sensitivity:
    r"""Curves of a metric, a point per group and ratio; every other group is whole.

    The drop of a point is :math:`m(0) - m(r)` where a high metric is good and :math:`m(r) - m(0)` where a low one is,
    in the metric's own unit (0.01 of an accuracy in [0, 1] is one per cent). See Li et al., "Pruning Filters for
    Efficient ConvNets", ICLR 2017, figure 2 (b), whose sensitive layers are pruned less or not at all.

    Attributes:
        dense: the metric of the model as it is.
        points: group by group in the order the model runs, by ratio.
        sizes: channels of every group.
        mode: ``max`` if a high metric is good, ``min`` if a low one is.
        metric: its name.

    Example:
        >>> points = Point("conv1", 0.25, 2, 0.90), Point("conv1", 0.5, 4, 0.89), Point("conv1", 0.75, 6, 0.6)
        >>> found = Sensitivity(0.91, points, {"conv1": 8})
        >>> found.within(0.02), found.within(0.005)
        ({'conv1': 0.5}, {'conv1': 0.0})
    """

    dense: float
    points: tuple[Point, ...]
    sizes: Mapping[str, int]
    mode: Mode = "max"
    metric: str = "metric"

    def drop(self, point: Point) -> float:
        """How much worse than dense; infinite where the metric was no number."""
        worse = point.value - self.dense if self.mode == "min" else self.dense - point.value
        return math.inf if math.isnan(worse) else worse

    @property
    def curves(self) -> dict[str, list[Point]]:
        """The points of every group, by ratio."""
        found: dict[str, list[Point]] = {group: [] for group in self.sizes}
        for point in sorted(self.points, key=lambda point: point.ratio):
            found[point.group].append(point)
        return found

    def within(self, drop: float) -> dict[str, float]:
        """Per group the largest measured ratio up to which it alone loses no more than that; 0 where none does.

        A later ratio that happens to lose less does not count, and nothing is interpolated. Groups pruned together lose
        more than each does alone: a small tolerance, and fine-tuning, are what this is for.

        Raises:
            PlanError: the tolerance is no number, or negative.
        """
        if not is_number(drop) or not drop >= 0:
            raise PlanError(f"a tolerated drop is a number >= 0 in the unit of the {self.metric}, got {drop!r}")
        ratios = {}
        limit = drop + 1e-9 * max(1.0, abs(self.dense))  # 0.91 - 0.89 is more than 0.02
        for group, curve in self.curves.items():
            failed = next((k for k, point in enumerate(curve) if self.drop(point) > limit), len(curve))
            ratios[group] = curve[failed - 1].ratio if failed else 0.0
        return ratios

    def layer_ratio(self, drop: float, **constraints: Any) -> LayerRatio:
        """`within` as a selection; groups that were not measured stay whole.

        Args:
            drop: see `within`.
            constraints: of `lightning_prune.selection.Selection`, as they were measured with.

        Raises:
            PlanError: see `within`.

        Example:
            >>> Sensitivity(0.9, (Point("conv1", 0.5, 4, 0.89),), {"conv1": 8}).layer_ratio(0.02).overrides
            {'conv1': 0.5}
        """
        overrides: dict[LayerName, float] = dict(self.within(drop).items())
        return LayerRatio(0.0, overrides=overrides, **constraints)
