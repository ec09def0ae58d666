"""The most score kept within a latency: widths by a latency table, corrected by measuring the models they make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lightning_prune.engines import Program, engine_from
from lightning_prune.errors import PlanError
from lightning_prune.measure.counting import count_flops
from lightning_prune.measure.latency_table import LatencyTable
from lightning_prune.measure.time_model import TimeModel
from lightning_prune.plan import Plan
from lightning_prune.selection.base import ByLayer, Question
from lightning_prune.selection.knapsack import Knapsack, Packing
from lightning_prune.selection.search import TOLERANCE, Reach, of_rebuilt
from lightning_prune.selection.stopwatch import Stopwatch
from lightning_prune.selection.table_choice import TableChoice
from lightning_prune.selection.table_widths import widths_of

if TYPE_CHECKING:
    from lightning_prune.selection.budget import Budget

MODELS = 8  # that are built and measured
AIM = 0.98  # of the budget; a second measurement comes out a little apart
NEAR = 0.96  # of the budget: close enough to stop
SAME = 0.02  # share by which two timings may differ and mean the same
AGAIN = 4  # models that are timed once more, since one that the table calls slower was faster


@dataclass
class _Tried:
    """A model that was built and measured."""

    packing: Packing
    readings: list[float] = field(default_factory=list)

    @property
    def measured(self) -> float:
        """Their mean; where they differ by more than honest ones do the middle one, of two the slower."""
        if len(self.readings) > 2:
            return median(self.readings)
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
        self._table = budget.table
        self._model, self._inputs = question.model, question.example_inputs
        if not self._table.elsewhere:
            self._table.check(budget.engine, torch.get_num_threads())
        elif self._table.engine != engine_from(budget.engine).name or self._table.whole_ms is None:
            raise PlanError(
                f"the latency table of another machine is of the engine {self._table.engine!r}, and its whole model "
                f"takes {self._table.whole_ms} ms; engine={budget.engine!r} needs one of that engine, made by a kit, "
                "which times the whole model too"
            )
        self._times = TimeModel(self._model, question.graph, self._inputs, self._table)
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
        if self._table.elsewhere:
            return self._unmeasured()
        if self._watch.dense <= self._most:
            return self._whole(self._watch.dense)
        knapsack = self._knapsack()
        for _ in range(MODELS):
            packing = self._next(knapsack)
            if packing is None:
                break
            if self._is_near(self._measured(packing)) and self._is_near(self._measured(packing)):
                break  # a timing that came out well by chance does not do so twice
            self._doubt()
        best = self._confirmed() or self._measured(knapsack.least())
        if best.measured > self._most:
            raise self._budget.unreachable(self._reach(best.measured))
        packing, dense = best.packing, self._watch.dense
        plan = self._plan(packing.kept)
        times = self._most, best.measured, dense
        return TableChoice(plan, packing.kept, packing.value, packing.bound, *times, len(self._tried))

    def _unmeasured(self) -> TableChoice:
        """By the table alone, scaled so that the dense model takes as long as it took there."""
        dense = self._dense
        if dense <= self._most:
            return self._whole(dense)
        per_ms = self._times.dense / dense
        knapsack = self._knapsack()
        if (least := knapsack.least().time / per_ms) > self._most:
            raise self._budget.unreachable(self._reach(least))
        packing = knapsack.solve(per_ms * self._most)
        times = self._most, packing.time / per_ms, dense
        where = str(self._table.machine.get("gpu") or self._table.machine.get("cpu"))
        return TableChoice(
            self._plan(packing.kept), packing.kept, packing.value, packing.bound, *times, models=0, elsewhere=where
        )

    def reach(self) -> Reach:
        """From the widths that take the least time by the table."""
        least = self._knapsack().least()
        if self._table.elsewhere:
            return self._reach(least.time * self._dense / self._times.dense)
        return self._reach(self._measured(least).measured)

    @cached_property
    def _watch(self) -> Stopwatch:
        return Stopwatch(self._budget.engine, self._model, self._inputs, self._budget.repeats)

    @property
    def _dense(self) -> float:
        return self._table.whole_ms if self._table.elsewhere and self._table.whole_ms else self._watch.dense

    def _reach(self, least: float) -> Reach:
        costs = ({"latency_ms": milliseconds} for milliseconds in (self._dense, least, self._most))
        return Reach(*costs)

    def _whole(self, dense: float) -> TableChoice:
        kept = {group.name: group.size for group in self._question.groups}
        value = float(sum(values[-1] for values in self._values().values()))
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

    def _doubt(self) -> None:
        """Time again what took longer than a model that should be slower: the machine may have been busy."""
        for _ in range(AGAIN):
            by_table = sorted(self._tried.values(), key=lambda tried: tried.packing.time)
            doubtful = (
                tried
                for place, tried in enumerate(by_table)
                if len(tried.readings) < 3 and any(o.measured < (1 - SAME) * tried.measured for o in by_table[place:])
            )
            tried = next(doubtful, None)
            if tried is None:
                return
            self._measured(tried.packing)

    def _next(self, knapsack: Knapsack) -> Packing | None:
        """What to measure next, if anything is new: near the budget; else between what fits and what does not."""
        fits = [tried.packing.time for tried in self._tried.values() if tried.measured <= self._most]
        others = [tried.packing.time for tried in self._tried.values() if tried.measured > self._most]
        between = (max(fits, default=0.0) + min(others, default=self._times.dense)) / 2
        for allowed in (self._table_time(AIM * self._most), between):
            packing = knapsack.solve(allowed)
            if tuple(packing.kept.values()) not in self._tried:
                return packing
        return self._half_way()

    def _half_way(self) -> Packing | None:
        """The best that fits, with half of what the fastest that does not has more: the table may call both alike."""
        packings = [(tried.packing, tried.measured <= self._most) for tried in self._tried.values()]
        low = max((packing for packing, fits in packings if fits), key=lambda packing: packing.value, default=None)
        high = min((packing for packing, fits in packings if not fits), key=lambda packing: packing.time, default=None)
        if low is None or high is None:
            return None
        values = self._values()
        gains = {name: float(values[name][high.kept[name]] - values[name][kept]) for name, kept in low.kept.items()}
        wider = sorted((name for name in gains if high.kept[name] > low.kept[name]), key=lambda name: -gains[name])
        taken = wider[: (len(wider) + 1) // 2]
        kept = {**low.kept, **{name: high.kept[name] for name in taken}}
        if tuple(kept.values()) in self._tried:
            return None
        value, time = low.value + sum(gains[name] for name in taken), (low.time + high.time) / 2
        return Packing(kept, value, time, max(high.bound, value))

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
        groups, layers, multiple = self._question.groups, self._times.layers, self._budget.round_to
        widths = {
            group.name: widths_of(group, groups, layers, self._table, multiple, self._budget._least(group.size))
            for group in groups
        }
        return Knapsack(widths, {name: values[name][own] for name, own in widths.items()}, self._times.layers)
