"""A budget: as many channels go as it takes for the reconstructed model to cost no more than it may."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final, get_args

from torch import nn
from typing_extensions import override

from lightning_prune.errors import NotReconstructedWarning, PlanError, TraceError
from lightning_prune.graph import ChannelGraph
from lightning_prune.measure.cost_model import CostModel
from lightning_prune.measure.measurement import Convention, count_params, flops_by_convention, measure_latency
from lightning_prune.plan import Coupling, Plan
from lightning_prune.reconstruction.small_model import reconstruct
from lightning_prune.selection.base import Kept, Question, Scores, Selection, changed
from lightning_prune.selection.network import Order

TOLERANCE = {"flops": 0.01, "params": 0.01, "latency_ms": 0.05}
AIM = {"flops": 0.01, "params": 0.01, "latency_ms": 0.04}  # a second measurement of a latency comes out a little apart
ESTIMATES, RECONSTRUCTIONS, CONFIRMATIONS = 500, 16, 4  # how many tries each stage of the search has


@dataclass(frozen=True)
class Reach:
    """How far a budget's constraints let a model shrink.

    Attributes:
        dense: cost of the dense model, by the budget's argument: operations, parameters, milliseconds.
        least: with every channel gone that may go, counted and timed on the reconstructed model.
        most: what the budget allows.
    """

    dense: Mapping[str, float]
    least: Mapping[str, float]
    most: Mapping[str, float]

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
            verdict = "can be met" if least <= most else "CANNOT be met"
            lines.append(
                f"{name}: dense {cost.format(dense)}, budget {cost.format(most)} ({_share(most, dense)}), at least "
                f"{cost.format(least)} ({_share(least, dense)}) remain: {verdict}"
            )
        return "\n".join(lines)


@final
class Budget(Selection):
    """What the reconstructed model may cost; the weakest channels over the network go until it does.

    Costs are shares of the dense model that **remain**: ``flops=0.5`` leaves at most half of the FLOPs, within 1% of
    that (relative; 5% for latency) wherever single channels are fine enough. If several are given, all hold, and the
    one that binds is met this closely. Channels go in the order of their scores, ties in the order of the network.
    Where the last one overshoots by more than the tolerance (a wide group, ``round_to``), the strongest of the
    removed that still fit come back.

    The number of channels is found by bisection on costs that follow from shapes (`lightning_prune.measure.CostModel`),
    and the model of the resulting plan is built and counted; where the two disagree (attention, other FLOPs
    conventions) the search goes on with models that are built and counted, as it does for latency.

    Args:
        flops: share of the dense FLOPs that may remain, in (0, 1).
        params: share of the dense parameters (frozen ones included) that may remain, in (0, 1).
        latency_ms: median milliseconds of a forward pass on the example inputs, as a whole, on the model's device
            and with torch's present number of threads. Machines differ: select on the one that will serve.
        convention: how FLOPs are counted, see `lightning_prune.measure.count_flops`.
        repeats: passes timed per model.
        min_channels: see `Selection`.
        round_to: see `Selection`.
        ignore: see `Selection`.

    Raises:
        PlanError: no budget or one that makes no sense; in `select` also one that cannot be met: the nearest that can
            is named.

    Example:
        >>> import torch, lightning_prune as lp
        >>> model = nn.Sequential(nn.Conv2d(3, 256, 3), nn.Conv2d(256, 256, 3), nn.ReLU(), nn.Conv2d(256, 4, 1))
        >>> images = torch.randn(1, 3, 8, 8)
        >>> result = lp.prune(model, images, criterion="l1", selection=lp.Budget(flops=0.5))
        >>> 0.495 < result.after.macs / result.before.macs <= 0.5
        True
    """

    needs_model: ClassVar[bool] = True

    def __init__(
        self,
        *,
        flops: float | None = None,
        params: float | None = None,
        latency_ms: float | None = None,
        convention: Convention = "macs",
        repeats: int = 10,
        min_channels: float = 1,
        round_to: int = 1,
        ignore: Iterable[str] = (),
    ) -> None:
        super().__init__(min_channels=min_channels, round_to=round_to, ignore=ignore)
        if flops is None and params is None and latency_ms is None:
            raise PlanError("a budget needs at least one of flops=, params=, latency_ms=")
        for name, share in (("flops", flops), ("params", params)):
            if share is not None and not (_is_number(share) and 0 < share < 1):
                raise PlanError(
                    f"{name} is the share of the dense model's that may remain and must be in (0, 1), got {share!r}"
                )
        if latency_ms is not None and not (_is_number(latency_ms) and 0 < latency_ms < math.inf):
            raise PlanError(f"latency_ms must be a positive number of milliseconds, got {latency_ms!r}")
        if convention not in get_args(Convention):
            raise PlanError(f"convention must be one of {', '.join(get_args(Convention))}, got {convention!r}")
        if not isinstance(repeats, int) or isinstance(repeats, bool) or repeats < 1:
            raise PlanError(f"repeats must be an integer >= 1, got {repeats!r}")
        self.flops = flops
        self.params = params
        self.latency_ms = latency_ms
        self.convention: Convention = convention
        self.repeats = repeats

    def __repr__(self) -> str:
        return (
            f"Budget(flops={self.flops!r}, params={self.params!r}, latency_ms={self.latency_ms!r}, "
            f"convention={self.convention!r}, repeats={self.repeats!r}, min_channels={self.min_channels!r}, "
            f"round_to={self.round_to!r}, ignore={self.ignore!r})"
        )

    @override
    def part(self, share: float) -> Budget:
        if self.latency_ms is not None:
            raise PlanError(f"{self!r}: what share of a latency a step should reach depends on the machine; use flops=")
        shares = {"flops": self.flops, "params": self.params}
        return changed(self, **{name: 1 - share * (1 - left) for name, left in shares.items() if left is not None})

    def reach(
        self,
        graph: ChannelGraph,
        scores: Scores,
        *,
        model: nn.Module,
        example_inputs: Any,
        coupling: Coupling = "joint",
    ) -> Reach:
        """Whether the budget can be met at all, before anything is done; arguments as for `select`.

        Raises:
            PlanError: nothing to prune.
            ScoreError: scores are missing, of wrong length, NaN or infinite.
        """
        question = self._question(graph, scores, coupling, True, model, example_inputs)
        order = Order(question, self._least)
        return _Costs(self, question).reach(question.plan(order.kept(len(order))))

    def _asks_for_removal(self) -> bool:
        return True

    def _kept(self, question: Question) -> Kept:
        order = Order(question, self._least)
        costs = _Costs(self, question)
        count = _smallest(
            lambda n: costs.fit(costs.estimate(question.plan(order.kept(n)))), len(order), len(order) // 2
        )
        if count is not None and self.latency_ms is None:
            kept = costs.filled(order, count, costs.estimate, ESTIMATES)
            plan = question.plan(kept)
            told, found = costs.estimate(plan), costs.measured(plan)
            if all(told[name] == found[name] for name in costs.most):  # shapes told the truth, and nothing fits closer
                return kept
        return costs.search(order, len(order) if count is None else count)


class _Costs:
    """Costs of plans under a budget, by its arguments."""

    def __init__(self, budget: Budget, question: Question) -> None:
        assert question.model is not None
        self.budget = budget
        self.question = question
        self.model = question.model
        self.timed = budget.latency_ms is not None
        self.shapes = CostModel(question.model, question.graph, question.example_inputs)
        self.dense = self.count(question.model)
        self.most: dict[str, float] = {
            name: share * self.dense[name]
            for name, share in (("flops", budget.flops), ("params", budget.params))
            if share is not None
        }
        if budget.latency_ms is not None:
            self.most["latency_ms"] = budget.latency_ms

    def estimate(self, plan: Plan) -> dict[str, float]:
        """From shapes; other conventions and the time are taken to shrink as the multiply-accumulates do."""
        params, macs = self.shapes.of(plan)
        if not self.shapes.macs:
            return {**self.dense, "params": params}
        factor = 2 if self.budget.convention == "flops2" else 1
        exact = self.budget.convention in ("macs", "flops2")
        share = macs / self.shapes.macs
        found = {"flops": factor * macs if exact else self.dense["flops"] * share, "params": params}
        return found | ({"latency_ms": self.dense["latency_ms"] * share} if self.timed else {})

    def measured(self, plan: Plan) -> dict[str, float]:
        """Of the reconstructed model."""
        q = self.question
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotReconstructedWarning)
            try:
                return self.count(reconstruct(self.model, q.graph, plan))
            except TraceError:  # the model's code needs some group as it is; comparing finds out which
                return self.count(reconstruct(self.model, q.graph, plan, example_inputs=q.example_inputs))

    def count(self, model: nn.Module) -> dict[str, float]:
        """Of a model."""
        inputs = self.question.example_inputs
        found: dict[str, float] = {
            "flops": flops_by_convention(model, inputs)[self.budget.convention],
            "params": count_params(model, trainable=False),
        }
        if self.timed:
            found["latency_ms"] = measure_latency(model, inputs, repeats=self.budget.repeats).median
        return found

    def fit(self, found: Mapping[str, float], slack: float = 0.0) -> bool:
        """Whether nothing costs more than it may."""
        return all(found[name] <= most * (1 + slack * TOLERANCE[name]) for name, most in self.most.items())

    def close(self, found: Mapping[str, float]) -> bool:
        """Whether something costs nearly what it may."""
        return any(found[name] >= most * (1 - AIM[name]) for name, most in self.most.items())

    def reach(self, least: Plan) -> Reach:
        """From the plan that removes the most."""
        return Reach(self.dense, self.measured(least), self.most)

    def search(self, order: Order, guess: int) -> Kept:
        """Bisect over models that are built and measured.

        Raises:
            PlanError: not even the smallest model fits.
        """
        plan = self.question.plan
        for _ in range(CONFIRMATIONS):
            seen: dict[int, dict[str, float]] = {}

            def found(count: int, seen: dict[int, dict[str, float]] = seen) -> dict[str, float]:
                if count not in seen:
                    seen[count] = self.measured(plan(order.kept(count)))
                return seen[count]

            count = _smallest(
                lambda n: self.fit(found(n)), len(order), guess, lambda n: self.fit(found(n)) and self.close(found(n))
            )
            if count is None:
                reach = self.reach(plan(order.kept(len(order))))
                if reach.met:  # a timing that came out shorter this time
                    continue
                raise PlanError(_unreachable(self.budget, reach))
            if not self.timed:
                return self.filled(order, count, self.measured, RECONSTRUCTIONS)
            again = self.measured(plan(order.kept(count)))
            if self.fit(again, slack=1) and (self.close(again) or self._last(order, count)):
                return order.kept(count)
            guess = count
        raise PlanError(
            f"{self.budget!r}: times of the same model keep differing by more than {TOLERANCE['latency_ms']:.0%}; "
            "leave the machine alone while it is measured, or raise repeats"
        )

    def _last(self, order: Order, count: int) -> bool:
        """Whether one channel more is too slow."""
        return count == 0 or not self.fit(self.measured(self.question.plan(order.kept(count - 1))))

    def filled(self, order: Order, count: int, cost: Callable[[Plan], dict[str, float]], tries: int) -> Kept:
        """The first ``count`` gone, but for the strongest of them that fit into what the budget leaves over."""
        back: list[int] = []
        full: set[int] = set()  # layers of which one more channel is too much
        best = self.question.plan(order.kept(count))
        now = cost(best)
        for step in range(count - 1, -1, -1):
            if self.close(now) or not tries:
                break
            layer = int(order.owners[step])
            if layer in full:
                continue
            plan = self.question.plan(order.kept(count, [*back, step]))
            if plan == best:  # rounding had brought it back already
                back.append(step)
                continue
            tries -= 1
            found = cost(plan)
            if not self.fit(found):
                full.add(layer)
            elif any(found[name] > now[name] for name in self.most):  # else it would come back for nothing
                back.append(step)
                best, now = plan, found
        return order.kept(count, back)


def _smallest(
    fits: Callable[[int], bool], last: int, guess: int, enough: Callable[[int], bool] = lambda _: False
) -> int | None:
    """The smallest count up to ``last`` that fits, if any: larger ones do too. Or the first found to be ``enough``.

    Steps that double lead from the guess to a count on the other side; then it is halving.
    """
    low, high, step, count = -1, last + 1, 1, guess
    while high - low > 1:
        if enough(count):
            return count
        if fits(count):
            high = count
        else:
            low = count
        if low >= 0 and high <= last:
            count = (low + high) // 2
        else:
            count = max(high - step, 0) if low < 0 else min(low + step, last)
        step *= 2
    return high if high <= last else None


def _unreachable(budget: Budget, reach: Reach) -> str:
    nearest = ", ".join(f"{name}={value:.6g}" for name, value in reach.nearest.items())
    return (
        f"the budget cannot be met even with every channel removed that min_channels={budget.min_channels!r}, "
        f"round_to={budget.round_to!r} and ignore={budget.ignore!r} let go. {'; '.join(str(reach).splitlines())}. "
        f"The nearest that can be met is Budget({nearest})"
    )


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0 %"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
