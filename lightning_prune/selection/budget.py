"""A budget: as many channels go as it takes for the reconstructed model to cost no more than it may."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, final

from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.engines import Engine, engine_from
from lightning_prune.errors import PlanError, check_choice
from lightning_prune.graph import ChannelGraph
from lightning_prune.measure import Convention
from lightning_prune.measure.latency_table import LatencyTable
from lightning_prune.plan import Coupling
from lightning_prune.selection.base import ByLayer, Question, Selection, is_count, is_number
from lightning_prune.selection.by_table import TableSearch
from lightning_prune.selection.search import TOLERANCE, Reach, Search
from lightning_prune.selection.table_choice import TableChoice

RemovalOrder = Literal["score", "score_per_cost", "share"]
ESTIMATES, RECONSTRUCTIONS, CONFIRMATIONS = 500, 16, 4  # how many tries each stage of the search has


@final
@dataclass(repr=False, eq=False, kw_only=True)
class Budget(Selection):
    """What the reconstructed model may cost; the weakest channels over the network go until it does.

    Costs are shares of the dense model that **remain**: ``flops=0.5`` leaves at most half of the FLOPs, within 1% of
    that (relative; 5% for latency) wherever single channels are fine enough. If several are given, all hold, and the
    one that binds is met this closely. Channels go as ``order`` says, ties in the order of the network.
    Where the last one overshoots by more than the tolerance (a wide group, ``round_to``), the strongest of the
    removed that still fit come back.

    The number of channels is found by bisection on costs that follow from shapes (`lightning_prune.measure.CostModel`),
    and the model of the resulting plan is built and counted; where the two disagree (attention, other FLOPs
    conventions) the search goes on with models that are built and counted, as it does for latency.

    Args:
        flops: share of the dense FLOPs that may remain, in (0, 1).
        params: share of the dense parameters (frozen ones included) that may remain, in (0, 1).
        latency_ms: median milliseconds of a forward pass on the example inputs, as a whole, with torch's present
            number of threads. Machines differ: select on the one that will serve. Models are timed in turns with the
            dense one; what is not faster than that is never chosen.
        engine: what runs the model when it is timed, see `lightning_prune.engines`.
        table: a `lightning_prune.measure.LatencyTable` of this model's layers on that engine, or its file. One of
            another machine, loaded by force, is believed without measuring. Then it is
            not the weakest channels over the network that go: every group keeps as many as bring the most score for
            their time, by the table, and widths that take as long as larger ones are not chosen. Up to eight such
            models are measured, to correct what the table does not know. Under joint coupling only.
        order: which go first. ``score``: the lowest scores of the network, wherever they are; scores of different
            layers have to be comparable. ``score_per_cost``: the lowest scores for what a channel costs in the dense
            model (multiply-accumulates; its parameters where the budget names them; both, each as a share of the
            network's, where it names both). ``share``: the same share of every layer, its weakest.
        convention: how FLOPs are counted, see `lightning_prune.measure.count_flops`.
        repeats: passes timed per model.
        min_channels, round_to, ignore: see `Selection`.

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
    engine: str | Engine = "eager"
    table: Any = None  # jsonargparse would read the file of a declared class as its arguments
    order: RemovalOrder = "score"
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
        engine_from(self.engine)
        if self.table is not None and (self.latency_ms is None or self.flops is not None or self.params is not None):
            raise PlanError("a latency table serves budgets of latency_ms= alone; leave out flops= and params=")
        if isinstance(self.table, str | os.PathLike):
            self.table = LatencyTable.load(self.table)
        if self.table is not None and not isinstance(self.table, LatencyTable):
            raise PlanError(f"table must be a LatencyTable or its file, got {self.table!r}")
        check_choice("order", self.order, RemovalOrder, PlanError)
        if self.table is not None and self.order != "score":
            raise PlanError(f"a latency table weighs scores against time by itself; leave out order={self.order!r}")
        check_choice("convention", self.convention, Convention, PlanError)
        if not is_count(self.repeats):
            raise PlanError(f"repeats must be an integer >= 1, got {self.repeats!r}")
        self.repeats = int(self.repeats)

    @property
    @override
    def measures_time(self) -> bool:
        return self.latency_ms is not None

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
        asked = self._asked(graph, scores, coupling, True, model, example_inputs)
        return Search(*asked).reach() if self.table is None else TableSearch(*asked).reach()

    def by_table(
        self,
        graph: ChannelGraph,
        scores: Mapping[str, Tensor],
        *,
        model: nn.Module,
        example_inputs: Any,
        coupling: Coupling = "joint",
        batch_norm: bool = True,
    ) -> TableChoice:
        """What `select` chooses by the latency table, with how good it is; arguments as for `select`.

        Raises:
            PlanError: there is no table, or as `select`.
            ScoreError: scores are missing, of wrong length, NaN or infinite.
        """
        if self.table is None:
            raise PlanError(f"{self!r} has no latency table; use select")
        return TableSearch(*self._asked(graph, scores, coupling, batch_norm, model, example_inputs)).run()

    def _asked(
        self,
        graph: ChannelGraph,
        scores: Mapping[str, Tensor],
        coupling: Coupling,
        batch_norm: bool,
        model: nn.Module,
        example_inputs: Any,
    ) -> tuple[Budget, Question]:
        """The budget with names in place of modules, and what it has to decide on."""
        named = self.named(model)
        return named, Question(graph, named._candidates(graph), scores, coupling, batch_norm, model, example_inputs)

    def _kept(self, question: Question) -> ByLayer:
        if self.table is not None:
            search_by_table = TableSearch(self, question)
            return search_by_table.masks(search_by_table.run().kept)
        search = Search(self, question)
        kept, last = search.ranking.kept, len(search.ranking)
        found = search.fewest(search.estimated, last // 2, exactly=True)
        guess = last if found is None else found
        if self.latency_ms is not None:
            return kept(self._timed(search, guess))
        if found is not None:
            back = search.spared(search.estimated, found, ESTIMATES)
            plan = search.plan(found, back)
            estimated, counted = search.estimated(plan), search.measured(plan)
            if all(estimated[name] == counted[name] for name in search.most):
                return kept(found, back)  # shapes told the truth, and nothing fits closer
        count = search.fewest(search.measured, guess)
        if count is None:
            raise self.unreachable(search.reach())
        return kept(count, search.spared(search.measured, count, RECONSTRUCTIONS))

    def _timed(self, search: Search, guess: int) -> int:
        """How many channels go for the time to fit, and to fit again when it is measured once more."""
        for _ in range(CONFIRMATIONS):
            count = search.fewest(search.measured, guess)
            if count is None:
                reach = search.reach()
                if not reach.met:  # else a timing that came out shorter this time
                    raise self.unreachable(reach)
                continue
            again = search.measured(search.plan(count))
            if search.allows(again, slack=1) and (
                search.is_near(again)
                or count == 0
                or not search.allows(search.measured(search.plan(count - 1)))  # one channel more is too slow
            ):
                return count
            guess = count
        raise PlanError(
            f"{self!r}: times of the same model keep differing by more than {TOLERANCE['latency_ms']:.0%}; "
            "leave the machine alone while it is measured, or raise repeats"
        )

    def unreachable(self, reach: Reach) -> PlanError:
        """The error that names the nearest budget."""
        nearest = ", ".join(f"{name}={value:.6g}" for name, value in reach.nearest.items())
        return PlanError(
            f"the budget cannot be met even with every channel removed that min_channels={self.min_channels!r}, "
            f"round_to={self.round_to!r} and ignore={self.ignore!r} let go. {'; '.join(str(reach).splitlines())}. "
            f"The nearest that can be met is Budget({nearest})"
        )
