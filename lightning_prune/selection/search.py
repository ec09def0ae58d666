"""The fewest channels that have to go for a model to cost no more than it may, found by bisection."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lightning_prune.plan import Plan
from lightning_prune.selection.base import ByLayer
from lightning_prune.selection.ranking import Ranking

TOLERANCE = {"flops": 0.01, "params": 0.01, "latency_ms": 0.05}
AIM = {"flops": 0.01, "params": 0.01, "latency_ms": 0.04}  # a second measurement of a latency comes out a little apart

Verdict = Literal["too much", "fits", "enough"]


@dataclass(frozen=True)
class Limits:
    """What a model may cost.

    Attributes:
        most: by the budget's argument: operations, parameters, milliseconds.
    """

    most: Mapping[str, float]

    def allow(self, costs: Mapping[str, float], slack: float = 0.0) -> bool:
        """Whether nothing costs more than it may; ``slack`` is a share of the tolerance."""
        return all(costs[name] <= most * (1 + slack * TOLERANCE[name]) for name, most in self.most.items())

    def are_near(self, costs: Mapping[str, float]) -> bool:
        """Whether something costs nearly what it may."""
        return any(costs[name] >= most * (1 - AIM[name]) for name, most in self.most.items())


class Search:
    """Tries how many of the weakest channels have to go.

    Args:
        ranking: the channels that may go, weakest first.
        plan_of: the plan that a choice comes to.
        limits: what may remain of the cost.
    """

    def __init__(self, ranking: Ranking, plan_of: Callable[[ByLayer], Plan], limits: Limits) -> None:
        self.ranking = ranking
        self.limits = limits
        self._plan_of = plan_of

    def plan(self, count: int, back: Sequence[int] = ()) -> Plan:
        """What is left once the first ``count`` are gone, but for those of the steps ``back``."""
        return self._plan_of(self.ranking.kept(count, back))

    def fewest(self, cost: Callable[[Plan], Mapping[str, float]], guess: int, *, exactly: bool = False) -> int | None:
        """How many have to go, None if not even all of them are enough.

        Args:
            cost: of a plan; the more go, the less it is.
            guess: where the search starts.
            exactly: go on to the fewest also where the cost is near its limit already.
        """

        def verdict(count: int) -> Verdict:
            costs = cost(self.plan(count))
            if not self.limits.allow(costs):
                return "too much"
            return "enough" if not exactly and self.limits.are_near(costs) else "fits"

        return smallest(verdict, len(self.ranking), guess)

    def spared(self, cost: Callable[[Plan], Mapping[str, float]], count: int, tries: int) -> list[int]:
        """The strongest of the first ``count`` that fit into what the limits leave over, after so many tries."""
        back: list[int] = []
        full: set[int] = set()  # layers of which one more channel is too much
        best = self.plan(count)
        now = cost(best)
        for step in range(count - 1, -1, -1):
            if self.limits.are_near(now) or not tries:
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
            if not self.limits.allow(costs):
                full.add(layer)
            elif any(costs[name] > now[name] for name in self.limits.most):  # else it would come back for nothing
                back.append(step)
                best, now = plan, costs
        return back


def smallest(verdict: Callable[[int], Verdict], last: int, guess: int) -> int | None:
    """The smallest count up to ``last`` that fits, if any: larger ones do too. Or the first found to be enough.

    Steps that double lead from the guess to a count on the other side; then it is halving.

    Example:
        >>> smallest(lambda count: "fits" if count >= 40 else "too much", 100, guess=90)
        40
    """
    low, high, step, count = -1, last + 1, 1, guess
    while high - low > 1:
        said = verdict(count)
        if said == "enough":
            return count
        if said == "fits":
            high = count
        else:
            low = count
        if low >= 0 and high <= last:
            count = (low + high) // 2
        else:
            count = max(high - step, 0) if low < 0 else min(low + step, last)
        step *= 2
    return high if high <= last else None
