"""The most score kept within a latency: widths by a latency table, corrected by measuring the models they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lightning_prune.engines import Program
from lightning_prune.errors import PlanError
from lightning_prune.graph import Group
from lightning_prune.measure.counting import count_flops
from lightning_prune.measure.latency_table import LatencyTable
from lightning_prune.measure.time_model import TimedLayer, TimeModel
from lightning_prune.plan import Plan
from lightning_prune.selection.base import ByLayer, Question
from lightning_prune.selection.knapsack import Knapsack, Packing
from lightning_prune.selection.search import TOLERANCE, Reach, of_rebuilt
from lightning_prune.selection.stopwatch import Stopwatch

if TYPE_CHECKING:
    from lightning_prune.selection.budget import Budget

WIDTHS = 48  # of a group that the knapsack chooses among, at most
MODELS = 8  # that are built and measured
AIM = 0.98  # of the budget; a second measurement comes out a little apart
NEAR = 0.96  # of the budget: close enough to stop


@dataclass(frozen=True)
class TableChoice:
    """What a table's knapsack came to.

    Attributes:
        plan: the channels.
        kept: {group: how many}.
        value: sum of the scores kept; where some are negative, all are raised by the least.
        bound: no choice among the widths considered keeps more in that time, by the table.
        budget_ms: milliseconds allowed.
        measured_ms: of the reconstructed model, on the engine.
        dense_ms: of the dense model, likewise.
        models: how many were built and measured.
    """

    plan: Plan
    kept: Mapping[str, int]
    value: float
    bound: float
    budget_ms: float
    measured_ms: float
    dense_ms: float
    models: int

    @property
    def gap(self) -> float:
        """Share of the bound that may be missing."""
        return max(self.bound - self.value, 0.0) / self.bound if self.bound > 0 else 0.0

    def __str__(self) -> str:
        if not self.models:
            return f"within {self.budget_ms:g} ms all channels stay: the dense model takes {self.dense_ms:,.2f} ms"
        return (
            f"the most score kept within {self.budget_ms:g} ms by the table: {self.value:.5g} of at most "
            f"{self.bound:.5g} (gap {100 * self.gap:.1f} %), measured {self.measured_ms:,.2f} ms, dense "
            f"{self.dense_ms:,.2f} ms"
        )


@dataclass
class _Tried:
    """A model that was built and measured."""

    packing: Packing
    readings: list[float] = field(default_factory=list)

    @property
    def measured(self) -> float:
        """Their mean; the slowest, where they differ by more than two honest ones do."""
        alike = max(self.readings) <= (1 + TOLERANCE["latency_ms"]) * min(self.readings)
        return sum(self.readings) / len(self.readings) if alike else max(self.readings)


class TableSearch:
    """Chooses by the table, measures what comes out, and corrects what the table has to promise."""

    def __init__(self, budget: Budget, question: Question) -> None:
        assert budget.latency_ms is not None
        if question.coupling != "joint":
            raise PlanError(
                f"a latency table chooses how many channels a whole group keeps, and under coupling="
                f"{question.coupling!r} layers choose by themselves; use coupling='joint', or Budget without table="
            )
        self._budget, self._question, self._most = budget, question, budget.latency_ms
        if question.model is None or question.example_inputs is None:
            raise PlanError(f"{budget!r} measures the pruned model: pass select(..., model=..., example_inputs=...)")
        assert isinstance(budget.table, LatencyTable)
        budget.table.check(budget.engine, torch.get_num_threads())
        self._model, self._inputs = question.model, question.example_inputs
        self._times = TimeModel(self._model, question.graph, self._inputs, budget.table)
        self._watch = Stopwatch(budget.engine, self._model, self._inputs, budget.repeats)
        self._tried: dict[tuple[int, ...], _Tried] = {}
        self._last: tuple[tuple[int, ...], Program] | None = None

    def masks(self, widths: Mapping[str, int]) -> ByLayer:
        """The channels themselves: the best of every group."""
        masks: ByLayer = {}
        for group in self._question.groups:
            scores = self._question.whole[group.name]
            masks[group.name] = {"": scores.argsort(stable=True).argsort() >= group.size - widths[group.name]}
        return masks

    def run(self) -> TableChoice:
        """The choice whose model has been measured to be within the budget, and near it where widths allow."""
        if self._watch.dense <= self._most:
            return self._whole()
        knapsack = self._knapsack()
        for _ in range(MODELS):
            packing = self._next(knapsack)
            if packing is None:
                break
            if self._is_near(self._measured(packing)) and self._is_near(self._measured(packing)):
                break  # a timing that came out well by chance does not do so twice
        best = self._confirmed() or self._measured(knapsack.least())
        if best.measured > self._most:
            raise self._budget.unreachable(self._reach(best.measured))
        packing, dense = best.packing, self._watch.dense
        plan = self._plan(packing.kept)
        times = self._most, best.measured, dense
        return TableChoice(plan, packing.kept, packing.value, packing.bound, *times, len(self._tried))

    def reach(self) -> Reach:
        """From the widths that take the least time by the table."""
        return self._reach(self._measured(self._knapsack().least()).measured)

    def _reach(self, least: float) -> Reach:
        costs = ({"latency_ms": milliseconds} for milliseconds in (self._watch.dense, least, self._most))
        return Reach(*costs)

    def _whole(self) -> TableChoice:
        kept = {group.name: group.size for group in self._question.groups}
        value = float(sum(values[-1] for values in self._values().values()))
        dense = self._watch.dense
        return TableChoice(self._plan(kept), kept, value, value, self._most, dense, dense, 0)

    def _plan(self, widths: Mapping[str, int]) -> Plan:
        return self._budget._plan(self._question, self.masks(widths))

    def _table_time(self, milliseconds: float) -> float:
        """What the table says of models that take so long: from the nearest one measured, on its line to the dense."""
        x, y = x_dense, y_dense = self._times.dense, self._watch.dense
        for tried in self._tried.values():
            if abs(tried.measured - milliseconds) < abs(y - milliseconds):
                x, y = tried.packing.time, tried.measured
        slope = (x_dense - x) / (y_dense - y) if x < x_dense and y < y_dense else x_dense / y_dense
        return x + slope * (milliseconds - y)

    def _confirmed(self) -> _Tried | None:
        """Of those that were twice measured to be within the budget the one that keeps the most."""
        for tried in sorted(self._tried.values(), key=lambda tried: -tried.packing.value):
            if tried.measured <= self._most and len(tried.readings) == 1:
                self._measured(tried.packing)
            if tried.measured <= self._most:
                return tried
        return None

    def _next(self, knapsack: Knapsack) -> Packing | None:
        """What to measure next, if anything is new: near the budget; else between what fits and what does not."""
        fits = [tried.packing.time for tried in self._tried.values() if tried.measured <= self._most]
        others = [tried.packing.time for tried in self._tried.values() if tried.measured > self._most]
        between = (max(fits, default=0.0) + min(others, default=self._times.dense)) / 2
        for allowed in (self._table_time(AIM * self._most), between):
            packing = knapsack.solve(allowed)
            if tuple(packing.kept.values()) not in self._tried:
                return packing
        return None

    def _is_near(self, tried: _Tried) -> bool:
        return NEAR * self._most <= tried.measured <= self._most

    def _measured(self, packing: Packing) -> _Tried:
        """Timed once more; a model that was timed just now is not built again."""
        key = tuple(packing.kept.values())
        tried = self._tried.setdefault(key, _Tried(packing))
        if self._last is None or self._last[0] != key:
            plan = self._plan(packing.kept)
            self._last = None
            self._last = key, of_rebuilt(self._program, self._model, self._question.graph, plan, self._inputs)
        tried.readings.append(self._watch.time(self._last[1]))
        return tried

    def _program(self, small: nn.Module) -> Program:
        count_flops(small, self._inputs)  # says what is wrong where the engine could not
        return self._watch.prepared(small)

    def _values(self) -> dict[str, NDArray[np.float64]]:
        """{group: the most score that 0, 1, 2, ... channels keep}."""
        whole = {name: scores.numpy() for name, scores in self._question.whole.items()}
        least = min(0.0, *(float(scores.min()) for scores in whole.values()))
        return {name: np.concatenate([[0.0], np.sort(scores - least)[::-1].cumsum()]) for name, scores in whole.items()}

    def _knapsack(self) -> Knapsack:
        values = self._values()
        widths = {group.name: self._widths(group) for group in self._question.groups}
        return Knapsack(widths, {name: values[name][own] for name, own in widths.items()}, self._times.layers)

    def _widths(self, group: Group) -> NDArray[np.int64]:
        """Where the table steps."""
        multiple, least = self._budget.round_to, self._budget._least(group.size)
        every = np.unique([*range(-(-least // multiple) * multiple, group.size, multiple), group.size])
        names = {name for layer in self._times.layers for name in (*layer.into.parts, *layer.out.parts)}
        dense = {other.name: other.size for other in self._question.groups if other.name in names}
        own = [layer for layer in self._times.layers if group.name in {**layer.into.parts, **layer.out.parts}]
        return every[steps(every, np.add(*(_profile(own, group.name, every, dense, share) for share in (1.0, 0.5))))]


def _profile(
    layers: list[TimedLayer], name: str, widths: NDArray[np.int64], dense: Mapping[str, int], share: float
) -> NDArray[np.float64]:
    """Milliseconds of a group's layers by its width, while all other groups keep a share."""
    kept: dict[str, Any] = {other: max(round(share * size), 1) for other, size in dense.items()}
    kept[name] = widths
    return np.asarray(sum((layer.at(kept) for layer in layers), np.zeros(len(widths))))


def steps(widths: NDArray[np.int64], times: NDArray[np.float64], most: int = WIDTHS) -> NDArray[np.int64]:
    """Which widths are worth choosing among: none that takes as long as a larger one, and those before a step.

    Args:
        widths: ascending.
        times: milliseconds at each.
        most: how many are left, about.

    Returns:
        Their positions, ascending; the widest and the fastest are among them.

    Example:
        >>> steps(np.arange(1, 9), np.array([1.0, 1, 1, 3, 2, 2, 2, 4]))  # widths 3, 7 and 8
        array([2, 6, 7])
    """
    least_later = np.minimum.accumulate(times[::-1])[::-1]
    good = np.flatnonzero(np.append(times[:-1] < least_later[1:], True))
    if len(good) <= most:
        return good
    # Of each stretch of widths the one that lies lowest under the slope of all.
    slope = (times[good[-1]] - times[good[0]]) / (widths[good[-1]] - widths[good[0]])
    height = times[good] - slope * widths[good]
    edges = np.linspace(widths[good[0]], widths[good[-1]], most)
    stretch = np.searchsorted(edges, widths[good], side="right")
    parts = (np.flatnonzero(stretch == number) for number in np.unique(stretch))
    return np.unique([good[0], *(good[part[height[part].argmin()]] for part in parts), good[-1]])
