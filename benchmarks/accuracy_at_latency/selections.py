"""Three selections under one criterion, each brought to the same measured latency."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.engines import engine_from
from lightning_prune.measure import compare_latency, compare_programs
from lightning_prune.measure.latency import in_eval_mode
from lightning_prune.selection import Selection

BELOW = 0.05  # how far below the target a latency may lie
CLOSE = 0.01  # and where the search is content
STEPS, FINEST = 10, 0.004  # of the bisection: tries, and settings that are told apart
TITLES = {
    "table": "Budget(latency_ms, table)",
    "flops": "Budget(flops)",
    "flops_8": "Budget(flops, round_to=8)",
    "layers": "LayerRatio",
    "layers_8": "LayerRatio(round_to=8)",
    "dense": "dense",
}
SELECTIONS = tuple(TITLES)[:-1]


class Point(NamedTuple):
    """What a setting came to."""

    setting: float
    share: float  # of the dense model's latency
    plan: lp.Plan | None


@dataclass
class Bench:
    """A dense network, its scores, and the clock."""

    dense: nn.Module
    inputs: Tensor
    engine: str
    repeats: int
    graph: lp.ChannelGraph
    scores: Any

    @classmethod
    def of(
        cls,
        dense: nn.Module,
        batches: list[tuple[Tensor, Tensor]],
        criterion: str,
        *,
        size: int,
        engine: str,
        repeats: int,
    ) -> Bench:
        """Scored on the batches; what is timed is one pass of ``size`` images."""
        inputs = batches[0][0][:size].contiguous()
        if len(inputs) < size:
            raise SystemExit(f"batches of at least {size} images are needed to time {size}")
        dense = dense.eval()
        graph = lp.trace(dense, inputs)
        scores = lp.score(dense, graph, criterion, batches=batches, loss=_loss)
        return cls(dense, inputs, engine, repeats, graph, scores)

    def small(self, plan: lp.Plan) -> nn.Module:
        """The reconstructed model."""
        return lp.reconstruct(self.dense, self.graph, plan)

    def milliseconds(self) -> float:
        """Of the dense model."""
        return self.compare({"dense": self.dense})["dense"].median

    def compare(self, models: dict[str, nn.Module]) -> dict[str, lp.measure.Latency]:
        """All of them in turns, each on the engine."""
        pairs = {name: (model, self.inputs) for name, model in models.items()}
        return compare_latency(pairs, engine=self.engine, repeats=self.repeats)

    def share(self, model: nn.Module) -> float:
        """Of the dense model's time, in turns with it; the larger of two findings, so that noise wins no latency."""
        if not hasattr(self, "_dense_program"):
            with in_eval_mode({"dense": (self.dense, self.inputs)}):
                self._dense_program = engine_from(self.engine).prepare(self.dense, self.inputs)
        with in_eval_mode({"": (model, self.inputs)}):
            program = engine_from(self.engine).prepare(model, self.inputs)
            pairs = {"dense": (self._dense_program, self.inputs), "small": (program, self.inputs)}
            found = [compare_programs(pairs, repeats=self.repeats) for _ in range(2)]
        return max(of["small"].median / of["dense"].median for of in found)

    def select(self, selection: Selection) -> lp.Plan:
        """The plan of a selection."""
        return selection.select(self.graph, self.scores, model=self.dense, example_inputs=self.inputs)

    def table(self, path: Path) -> Any:
        """The latency table of this model on this machine: read, or made and written."""
        if path.is_file():
            return lp.measure.LatencyTable.load(path)
        table = lp.measure.make_table(self.dense, self.inputs, engine=self.engine, graph=self.graph)
        path.parent.mkdir(parents=True, exist_ok=True)
        table.save(path)
        return table

    def chosen(self, kind: str, budget: float, table: Path) -> dict[str, Any]:
        """The row of one selection at a share of the dense latency."""
        started = time.perf_counter()
        if kind == "table":
            target = budget * self.milliseconds()
            plan = self.select(lp.Budget(latency_ms=target, engine=self.engine, table=self.table(table)))
            point = Point(target, self.share(self.small(plan)), plan)
        else:
            point = nearest_below(lambda setting: self._try(kind, setting), budget)
        assert point.plan is not None
        small = self.small(point.plan)
        cost = [lp.measure.count_flops(model, self.inputs[:1]) for model in (small, self.dense)]
        params = [lp.measure.count_params(model) for model in (small, self.dense)]
        return {
            "setting": point.setting,
            "share": point.share,
            "flops": cost[0] / cost[1],
            "params": params[0] / params[1],
            "plan": point.plan.to_dict(),
            "seconds": time.perf_counter() - started,
        }

    def _try(self, kind: str, setting: float) -> Point:
        """At ``setting``: the share of FLOPs, or of every layer's channels, that stays."""
        round_to = 8 if kind.endswith("_8") else 1
        flops = kind.startswith("flops")
        selection = (
            lp.Budget(flops=setting, round_to=round_to) if flops else lp.LayerRatio(1 - setting, round_to=round_to)
        )
        try:
            plan = self.select(selection)
        except lp.PruningError as error:
            print(f"{kind} at {setting:.3f}: {error}", flush=True)
            return Point(setting, 0.0, None)  # so little cannot be kept
        share = self.share(self.small(plan))
        print(f"{kind} at {setting:.3f}: {share:.3f} of the dense time", flush=True)
        return Point(setting, share, plan)


def nearest_below(attempt: Callable[[float], Point], target: float) -> Point:
    """By bisection the setting in (0, 1) whose share comes closest to the target from below."""
    low, high, best, setting = 0.0, 1.0, None, target
    for _ in range(STEPS):
        point = attempt(setting)
        if point.share > target:
            high = setting
        else:
            low = setting
            if point.plan is not None and (best is None or point.share > best.share):
                best = point
        if high - low < FINEST or (best is not None and best.share >= (1 - CLOSE) * target):
            break
        setting = (low + high) / 2
    if best is None:
        raise lp.PruningError(f"no setting has {target:.0%} of the dense latency or less")
    if best.share < (1 - BELOW) * target:
        print(f"the nearest below {target:.0%} is {best.share:.1%} of the dense latency", flush=True)
    return best


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])
