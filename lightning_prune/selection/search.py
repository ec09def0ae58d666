"""The fewest channels that have to go for a model to cost no more than it may, found by bisection."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from lightning_prune.errors import NotReconstructedWarning, PlanError, TraceError
from lightning_prune.graph import ChannelGraph, Group
from lightning_prune.measure import CostModel, count_params, flops_by_convention
from lightning_prune.plan import Plan
from lightning_prune.reconstruction.small_model import reconstruct
from lightning_prune.selection.base import Question
from lightning_prune.selection.ratio import Ranking
from lightning_prune.selection.stopwatch import Stopwatch

if TYPE_CHECKING:
    from lightning_prune.selection.budget import Budget

TOLERANCE = {"flops": 0.01, "params": 0.01, "latency_ms": 0.05}
AIM = {"flops": 0.01, "params": 0.01, "latency_ms": 0.04}  # a second measurement of a latency comes out a little apart
TINY = 1e-12  # share of the dense cost: what costs nothing goes last

T = TypeVar("T")
Costs = Mapping[str, float]  # by the budget's argument: operations, parameters, milliseconds
Verdict = Literal["too much", "fits", "enough"]


@dataclass(frozen=True)
class Reach:
    """How far a budget's constraints let a model shrink.

    Attributes:
        dense: cost of the dense model, by the budget's argument: operations, parameters, milliseconds.
        least: with every channel gone that may go, counted and timed on the reconstructed model.
        most: what the budget allows.
    """

    dense: Costs
    least: Costs
    most: Costs

    @property
    def met(self) -> bool:
        """Whether the budget can be met."""
        return all(self.least[name] <= most for name, most in self.most.items())

    @property
    def nearest(self) -> dict[str, float]:
        """Arguments of the nearest budget that can be met, rounded up to three decimals; timings with 5% to spare."""
        arguments = {}
        for name, most in self.most.items():
            least = self.least[name] * (1 + TOLERANCE[name] if name == "latency_ms" else 1)
            unit = 1.0 if name == "latency_ms" else self.dense[name]
            arguments[name] = round(most / unit, 9) if most >= least else math.ceil(1000 * least / unit) / 1000
        return arguments

    def __str__(self) -> str:
        lines = []
        for name, most in self.most.items():
            cost = "{:,.2f} ms" if name == "latency_ms" else "{:,.0f}"
            least, dense = self.least[name], self.dense[name]
            budget, left = (f"{cost.format(part)} ({100 * part / (dense or 1):.1f} %)" for part in (most, least))
            verdict = "can be met" if least <= most else "CANNOT be met"
            lines.append(f"{name}: dense {cost.format(dense)}, budget {budget}, at least {left} remain: {verdict}")
        return "\n".join(lines)


class Search:
    """Tries how many of the weakest channels have to go until what remains fits a budget.

    Attributes:
        ranking: the channels, weakest first.
        dense: costs of the dense model.
        most: what the budget allows, of each cost that it names.
    """

    def __init__(self, budget: Budget, question: Question) -> None:
        if question.model is None or question.example_inputs is None:
            raise PlanError(f"{budget!r} counts the pruned model: pass select(..., model=..., example_inputs=...)")
        self._budget, self._question = budget, question
        self._model, self._inputs = question.model, question.example_inputs
        self._shapes = CostModel(self._model, question.graph, self._inputs)
        self.ranking = Ranking(question, budget._least, self._key)
        self._watch = None
        if budget.latency_ms is not None:
            self._watch = Stopwatch(budget.engine, self._model, self._inputs, budget.repeats)
        self.dense = self._of(self._model)
        units = {**self.dense, "latency_ms": 1.0}  # shares of the dense model, and milliseconds
        self.most = {name: asked * unit for name, unit in units.items() if (asked := getattr(budget, name))}

    def _key(self, group: Group, scores: Tensor) -> Tensor:
        """By what channels of different groups are compared."""
        if self._budget.order == "score":
            return scores
        if self._budget.order == "share":
            return (scores.argsort(stable=True).argsort() + 0.5) / len(scores)
        params, macs = self._shapes.of_a_channel(group)
        cost = (params / self._shapes.params if self._budget.params is not None else 0.0) + (
            macs / (self._shapes.macs or 1) if self._budget.params is None or self._budget.flops is not None else 0.0
        )
        # what does harm goes first whatever it costs; so does, in a later step, what an earlier one removed
        return torch.where(scores < 0, scores, scores / max(cost, TINY))

    def plan(self, count: int, back: Sequence[int] = ()) -> Plan:
        """What is left once the first ``count`` are gone, but for those of the steps ``back``."""
        return self._budget._plan(self._question, self.ranking.kept(count, back))

    def allows(self, costs: Costs, slack: float = 0.0) -> bool:
        """Whether nothing costs more than it may; ``slack`` is a share of the tolerance."""
        if list(self.most) == ["latency_ms"] and costs["latency_ms"] > self.dense["latency_ms"]:
            return False  # channels that cost score, and save nothing
        return all(costs[name] <= most * (1 + slack * TOLERANCE[name]) for name, most in self.most.items())

    def is_near(self, costs: Costs) -> bool:
        """Whether something costs nearly what it may."""
        return any(costs[name] >= most * (1 - AIM[name]) for name, most in self.most.items())

    def estimated(self, plan: Plan) -> Costs:
        """From shapes; the time, and conventions other than ``macs``, are taken to shrink as the ``macs`` do."""
        params, macs = self._shapes.of(plan)
        return {name: cost * macs / (self._shapes.macs or 1) for name, cost in self.dense.items()} | {"params": params}

    def measured(self, plan: Plan) -> Costs:
        """Of the reconstructed model."""
        return of_rebuilt(lambda small: self._of(small, plan), self._model, self._question.graph, plan, self._inputs)

    def reach(self) -> Reach:
        """From the plan that removes the most."""
        return Reach(self.dense, self.measured(self.plan(len(self.ranking))), self.most)

    def fewest(self, cost: Callable[[Plan], Costs], guess: int, *, exactly: bool = False) -> int | None:
        """How many have to go, None if all are not enough; ``exactly`` the fewest, where another is near the limit."""

        def verdict(count: int) -> Verdict:
            costs = cost(self.plan(count))
            if not self.allows(costs):
                return "too much"
            return "enough" if not exactly and self.is_near(costs) else "fits"

        return smallest(verdict, len(self.ranking), guess)

    def spared(self, cost: Callable[[Plan], Costs], count: int, tries: int) -> list[int]:
        """The strongest of the first ``count`` that fit into what the limits leave over, after so many tries."""
        back: list[int] = []
        full: set[int] = set()  # layers of which one more channel is too much
        best = self.plan(count)
        now = cost(best)
        for step in range(count - 1, -1, -1):
            if self.is_near(now) or not tries:
                break
            layer = int(self.ranking.owners[step])
            if layer in full:
                continue
            plan = self.plan(count, [*back, step])
            if plan == best:  # rounding had brought it back already
                back.append(step)
                continue
            tries -= 1
            costs = cost(plan)
            if not self.allows(costs):
                full.add(layer)
            elif any(costs[name] > now[name] for name in self.most):  # else it would come back for nothing
                back.append(step)
                best, now = plan, costs
        return back

    def _of(self, model: nn.Module, plan: Plan | None = None) -> Costs:
        found: dict[str, float] = {
            "flops": flops_by_convention(model, self._inputs)[self._budget.convention],
            "params": count_params(model, trainable=False),
        }
        if self._watch is not None:
            found["latency_ms"] = self._watch.time(self._watch.prepared(model)) if plan else self._watch.dense
        return found


def of_rebuilt(
    cost: Callable[[nn.Module], T], model: nn.Module, graph: ChannelGraph, plan: Plan, example_inputs: Any
) -> T:
    """Something of the reconstructed model, less the groups that the model's code needs as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotReconstructedWarning)
        try:
            return cost(reconstruct(model, graph, plan))
        except TraceError:  # it does not run; comparing finds out which groups
            return cost(reconstruct(model, graph, plan, example_inputs=example_inputs))


def smallest(verdict: Callable[[int], Verdict], last: int, guess: int) -> int | None:
    """The smallest count up to ``last`` that fits, if any, or the first found enough: doubling steps, then halving."""
    low, high, step, count = -1, last + 1, 1, guess
    while high - low > 1:
        said = verdict(count)
        if said == "enough":
            return count
        low, high = (low, count) if said == "fits" else (count, high)
        if low >= 0 and high <= last:
            count = (low + high) // 2
        else:
            count = max(high - step, 0) if low < 0 else min(low + step, last)
        step *= 2
    return high if high <= last else None
