"""Times of smaller models on an engine, always in turns with the dense one: what else the machine does hits both."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from lightning_prune.engines import Engine, Program, engine_from
from lightning_prune.measure.latency import Latency, compare_programs, in_eval_mode

LEAST_MS, MOST_ROUNDS = 500.0, 100  # short passes are timed for this long together, or this often
CALM, TRIES = 0.06, 5  # the dense model this much slower than before: the machine is busy; how often that is waited for
SURE, PATIENCE = 0.005, 4  # standard error of a ratio that is enough; so many times the rounds are made at most for it


class Stopwatch:
    """Milliseconds of models, as if the machine were as fast as when the dense one was timed first.

    Args:
        engine: what runs them.
        model: dense; left as it is.
        inputs: of a pass.
        repeats: passes timed per model, at least.

    Attributes:
        engine: what runs them.
        dense: median milliseconds of the dense model.
    """

    def __init__(self, engine: str | Engine, model: nn.Module, inputs: Any, repeats: int) -> None:
        self.engine = engine_from(engine)
        self._model, self._inputs, self._rounds = model, inputs, repeats
        with in_eval_mode({"dense": (model, inputs)}):
            self._dense = self.engine.prepare(model, inputs)
            programs = {"dense": (self._dense, inputs)}
            self.dense = compare_programs(programs, repeats=repeats)["dense"].median
            self._rounds = max(repeats, min(MOST_ROUNDS, math.ceil(LEAST_MS / max(self.dense, 1e-9))))
            again = (compare_programs(programs, repeats=self._rounds)["dense"].median for _ in range(2))
            self.dense = min(self.dense, *again)  # a busy moment is no measure of a model
        self._fastest = math.inf  # milliseconds of the dense one in turns with others

    def prepared(self, model: nn.Module) -> Program:
        """A smaller model, from now on in eval mode, as `time` takes it."""
        return self.engine.prepare(model.eval(), self._inputs)

    def time(self, program: Program) -> float:
        """Milliseconds of another model on the same inputs, while the dense one is as fast as it was seen before.

        A busy machine slows a small model otherwise than a large one, so it does not do to divide.
        """
        readings: list[tuple[float, float]] = []
        with in_eval_mode({"dense": (self._model, self._inputs)}):
            for _ in range(TRIES):
                readings.append(self._in_turns(program))
                self._fastest = min(self._fastest, readings[-1][0])
                if readings[-1][0] <= (1 + CALM) * self._fastest:
                    break
        _, ratio = min(readings)
        return self.dense * ratio

    def _in_turns(self, program: Program) -> tuple[float, float]:
        """The dense model's milliseconds, and the ratio of both, timed for longer where the rounds differ."""
        programs = {"dense": (self._dense, self._inputs), "smaller": (program, self._inputs)}
        ratios: list[float] = []
        times: list[float] = []
        while len(ratios) < PATIENCE * self._rounds:
            found = compare_programs(programs, warmup=0 if ratios else None, repeats=self._rounds)
            pairs = zip(found["smaller"].samples, found["dense"].samples, strict=True)
            ratios += [smaller / max(dense, 1e-9) for smaller, dense in pairs]
            times += found["dense"].samples
            ratio = Latency.of(ratios)
            # 0.93 quartile distances / sqrt(n): standard error of a median of normal values
            if 0.93 * ratio.iqr <= SURE * ratio.median * math.sqrt(len(ratios)):
                break
        return Latency.of(times).median, ratio.median
