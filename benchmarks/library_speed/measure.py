"""The rows: a model beside the peer and `prune` beside its own steps, or a trace beside the operators of a forward."""

from __future__ import annotations

import copy
import gc
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

import lightning_prune as lp
from benchmarks import Operators
from benchmarks.zoo import peer
from benchmarks.zoo.families import Entry
from benchmarks.zoo.models import Case, prepare, told
from benchmarks.zoo.runner import Row
from lightning_prune.graph import call_model

RATIO = 0.5
ROUNDS = 3  # of prune() beside its steps, and of a trace
ENOUGH = 4.0  # seconds, after which a round is not repeated


@dataclass(frozen=True)
class Options:
    """Which part, and how many rounds against the peer."""

    operators: bool = False
    repeats: int = 5


def measure(entry: Entry, options: Options, emit: Callable[[Row], None]) -> Row:
    """The row of one model; ``outcome`` is pruned, traced, or why it was not. ``emit``: see `runner.work`."""
    row: Row = {**asdict(entry), "key": entry.key, "torch": torch.__version__, "outcome": "error: cut short"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer.warm_up(peer=not options.operators)
        try:
            case = prepare(entry)
        except Exception as error:  # noqa: BLE001
            return row | {"outcome": f"error: the dense model: {told(error)}"}
        try:
            if options.operators:
                return row | by_operators(case)
            row |= {"prune": beside_its_steps(case.model, case.inputs), "outcome": "pruned"}
        except Exception as error:  # noqa: BLE001 - a refusal, or any failure
            kind = "refused" if isinstance(error, lp.PruningError) else "error"
            return row | {"outcome": f"{kind}: {told(error)}"}
        emit({**row, "peer": {"outcome": "error: crashed or ran out of time"}})
        try:
            row["peer"] = peer.compare(case, entry, RATIO, options.repeats)
        except Exception as error:  # noqa: BLE001
            row["peer"] = {"outcome": f"error: {told(error)}"}
    return row


def beside_its_steps(model: nn.Module, inputs: Any) -> Row:
    """Seconds of `lightning_prune.prune`, of its steps each, and in how much of their sum it is done."""
    whole: list[float] = []
    steps: list[dict[str, float]] = []
    while len(whole) < ROUNDS and sum(whole) < ENOUGH:
        own = copy.deepcopy(model)
        gc.collect()
        start = time.process_time()
        result = lp.prune(own, inputs, criterion=lp.L1(), selection=lp.LayerRatio(RATIO))
        whole.append(time.process_time() - start)
        del result
        steps.append(_steps(own, inputs))
    stages, seconds = peer.medians(steps), median(whole)
    of_steps = median(sum(found.values()) for found in steps)
    return {"seconds": round(seconds, 4), "steps": stages, "ratio": round(seconds / of_steps, 3)}


def _steps(model: nn.Module, inputs: Any) -> dict[str, float]:
    stages = peer.Stages()
    graph = stages.timed("trace", lambda: lp.trace(model, inputs))
    scores = stages.timed("score", lambda: lp.score(model, graph, lp.L1()))
    plan = stages.timed("select", lambda: lp.LayerRatio(RATIO).select(graph, scores))
    stages.timed("mask", lambda: lp.mask_(model, graph, plan))
    stages.timed("compare", lambda: lp.reconstruct(model, graph, plan, example_inputs=inputs))
    return stages.seconds


def by_operators(case: Case) -> Row:
    """Operators of a forward, and seconds of a trace."""
    inputs = copy.deepcopy(case.inputs)  # which the model may change in place
    with torch.no_grad(), Operators() as operators:
        call_model(case.model.eval(), inputs)
    seconds: list[float] = []
    while len(seconds) < ROUNDS and sum(seconds) < ENOUGH:
        stages = peer.Stages()
        stages.timed("trace", lambda: lp.trace(case.model, case.inputs))
        seconds.append(stages.seconds["trace"])
    return {"operators": operators.count, "trace": round(median(seconds), 4), "outcome": "traced"}
