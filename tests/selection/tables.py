"""Latency tables made up for tests, and an engine whose programs take what a table says, on a clock of ours."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import nn

from lightning_prune.engines import Engine, Program, engine_from
from lightning_prune.errors import PlanError
from lightning_prune.measure import latency
from lightning_prune.measure.latency_table import LatencyTable
from lightning_prune.measure.layer_calls import LayerKind, layer_calls


class Steps(LatencyTable):
    """Multiply-accumulates with channels in and out filled up to a multiple, and a little for every call."""

    def __init__(self, lane: int = 8, call_ms: float = 0.001, slow: Callable[[Any], Any] | None = None) -> None:
        super().__init__({}, engine="simulated")
        vars(self).update(_lane=lane, _call=call_ms, _slow=slow)  # a dataclass, and frozen

    def time(self, kind: LayerKind, channels_in: Any, channels_out: Any) -> Any:
        filled_in, filled_out = (-(-np.asarray(n) // self._lane) * self._lane for n in (channels_in, channels_out))
        if kind.groups == 0:
            filled_in = np.ones_like(filled_out)
        places = np.prod(kind.size) * kind.batch
        milliseconds = self._call + 1e-6 * places * np.prod(kind.kernel) * filled_in * filled_out / max(kind.groups, 1)
        return milliseconds * (1.0 if self._slow is None else self._slow(np.asarray(channels_out)))

    def check(self, engine: Any, threads: int | None = None, *, force: bool = False) -> None:
        if engine_from(engine).name != self.engine:
            raise PlanError(f"the table is of the engine {self.engine!r}, not {engine!r}")


class Simulated(Engine):
    """Passes take ``scale`` times the table's milliseconds and ``offset``, times the machine's mood at the moment."""

    name = "simulated"

    def __init__(self, monkeypatch: pytest.MonkeyPatch, table: Steps, scale: float = 1.0, offset: float = 0.0) -> None:
        self._table, self._scale, self._offset = table, scale, offset
        self.now, self.passes, self.prepared = 0.0, 0, 0
        self.mood: Callable[[int], float] = lambda _: 1.0
        monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def milliseconds(self, model: nn.Module, x: Any) -> float:
        calls = layer_calls(model, x)
        return float(self._scale * sum(self._table.time(c.kind, *c.channels) for c in calls) + self._offset)

    def prepare(self, model: nn.Module, example_inputs: Any) -> Program:
        assert not model.training
        self.prepared += 1
        takes = self.milliseconds(model, example_inputs)
        engine = self

        class Waits(Program):
            def run(self, inputs: Any) -> Any:
                engine.passes += 1
                engine.now += takes * engine.mood(engine.passes) / 1e3

        return Waits()
