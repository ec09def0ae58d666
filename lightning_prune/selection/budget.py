"""A budget: as many channels go as it takes for the reconstructed model to cost no more than it may."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, final, get_args

from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.errors import NotReconstructedWarning, PlanError, TraceError
from lightning_prune.graph import ChannelGraph
from lightning_prune.measure import Convention, CostModel, count_params, flops_by_convention, measure_latency
from lightning_prune.plan import Coupling, Plan
from lightning_prune.reconstruction.small_model import reconstruct
from lightning_prune.selection.base import ByLayer, Question, Selection, check_choice, is_count, is_number
from lightning_prune.selection.ranking import Ranking
from lightning_prune.selection.search import TOLERANCE, Limits, Search

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
@dataclass(repr=False, eq=False, kw_only=True)
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

    flops: float | None = None
    params: float | None = None
    latency_ms: float | None = None
    convention: Convention = "macs"
    repeats: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.flops is None and self.params is None and self.latency_ms is None:
            raise PlanError("a budget needs at least one of flops=, params=, latency_ms=")
        for name, share in (("flops", self.flops), ("params", self.params)):
            if share is not None and not (is_number(share) and 0 < share < 1):
                raise PlanError(
                    f"{name} is the share of the dense model's that may remain and must be in (0, 1), got {share!r}"
                )
        if self.latency_ms is not None and not (is_number(self.latency_ms) and 0 < self.latency_ms < math.inf):
            raise PlanError(f"latency_ms must be a positive number of milliseconds, got {self.latency_ms!r}")
        check_choice("convention", self.convention, get_args(Convention))
        if not is_count(self.repeats):
            raise PlanError(f"repeats must be an integer >= 1, got {self.repeats!r}")
        self.repeats = int(self.repeats)

    @override
    def part(self, share: float) -> Budget:
        if self.latency_ms is not None:
            raise PlanError(f"{self!r}: what share of a latency a step should reach depends on the machine; use flops=")
        flops, params = (left and 1 - share * (1 - left) for left in (self.flops, self.params))
        return replace(self, flops=flops, params=params)

    def reach(
        self,
        graph: ChannelGraph,
        scores: Mapping[str, Tensor],
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
        question = Question(graph, self._candidates(graph), scores, coupling, True, model, example_inputs)
        costs = _Costs(self, question)
        return costs.reach(self._search(question, costs))

    def _kept(self, question: Question) -> ByLayer:
        costs = _Costs(self, question)
        search = self._search(question, costs)
        kept, last = search.ranking.kept, len(search.ranking)
        found = search.fewest(costs.estimated, last // 2, exactly=True)
        guess = last if found is None else found
        if self.latency_ms is not None:
            return kept(self._timed(search, costs, guess))
        if found is not None:
            back = search.spared(costs.estimated, found, ESTIMATES)
            plan = search.plan(found, back)
            estimated, counted = costs.estimated(plan), costs.measured(plan)
            if all(estimated[name] == counted[name] for name in costs.limits.most):
                return kept(found, back)  # shapes told the truth, and nothing fits closer
        count = search.fewest(costs.measured, guess)
        if count is None:
            raise self._unreachable(costs.reach(search))
        return kept(count, search.spared(costs.measured, count, RECONSTRUCTIONS))

    def _timed(self, search: Search, costs: _Costs, guess: int) -> int:
        """How many channels go for the time to fit, and to fit again when it is measured once more."""
        for _ in range(CONFIRMATIONS):
            count = search.fewest(costs.measured, guess)
            if count is None:
                reach = costs.reach(search)
                if not reach.met:  # else a timing that came out shorter this time
                    raise self._unreachable(reach)
                continue
            again = costs.measured(search.plan(count))
            if costs.limits.allow(again, slack=1) and (
                costs.limits.are_near(again)
                or count == 0
                or not costs.limits.allow(costs.measured(search.plan(count - 1)))  # one channel more is too slow
            ):
                return count
            guess = count
        raise PlanError(
            f"{self!r}: times of the same model keep differing by more than {TOLERANCE['latency_ms']:.0%}; "
            "leave the machine alone while it is measured, or raise repeats"
        )

    def _search(self, question: Question, costs: _Costs) -> Search:
        return Search(Ranking(question, self._least), partial(self._plan, question), costs.limits)

    def _unreachable(self, reach: Reach) -> PlanError:
        nearest = ", ".join(f"{name}={value:.6g}" for name, value in reach.nearest.items())
        return PlanError(
            f"the budget cannot be met even with every channel removed that min_channels={self.min_channels!r}, "
            f"round_to={self.round_to!r} and ignore={self.ignore!r} let go. {'; '.join(str(reach).splitlines())}. "
            f"The nearest that can be met is Budget({nearest})"
        )


class _Costs:
    """Costs of plans under a budget, by its arguments."""

    def __init__(self, budget: Budget, question: Question) -> None:
        if question.model is None or question.example_inputs is None:
            raise PlanError(f"{budget!r} counts the pruned model: pass select(..., model=..., example_inputs=...)")
        self.budget = budget
        self.graph, self.model, self.inputs = question.graph, question.model, question.example_inputs
        self.shapes = CostModel(self.model, self.graph, self.inputs)
        self.dense = self._of(self.model)
        most = {name: share * self.dense[name] for name in ("flops", "params") if (share := getattr(budget, name))}
        self.limits = Limits(most if budget.latency_ms is None else {**most, "latency_ms": budget.latency_ms})

    def estimated(self, plan: Plan) -> dict[str, float]:
        """From shapes; the time, and conventions other than ``macs``, are taken to shrink as the ``macs`` do."""
        params, macs = self.shapes.of(plan)
        dense = self.shapes.macs or 1
        found: dict[str, float] = {"flops": self.dense["flops"] * macs // dense, "params": params}
        if "latency_ms" in self.dense:
            found["latency_ms"] = self.dense["latency_ms"] * macs / dense
        return found

    def measured(self, plan: Plan) -> dict[str, float]:
        """Of the reconstructed model."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotReconstructedWarning)
            try:
                return self._of(reconstruct(self.model, self.graph, plan))
            except TraceError:  # the model's code needs some group as it is; comparing finds out which
                return self._of(reconstruct(self.model, self.graph, plan, example_inputs=self.inputs))

    def reach(self, search: Search) -> Reach:
        """From the plan that removes the most."""
        return Reach(self.dense, self.measured(search.plan(len(search.ranking))), self.limits.most)

    def _of(self, model: nn.Module) -> dict[str, float]:
        found: dict[str, float] = {
            "flops": flops_by_convention(model, self.inputs)[self.budget.convention],
            "params": count_params(model, trainable=False),
        }
        if self.budget.latency_ms is not None:
            found["latency_ms"] = measure_latency(model, self.inputs, repeats=self.budget.repeats).median
        return found


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0 %"
