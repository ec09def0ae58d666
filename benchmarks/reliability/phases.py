"""What a forked process is doing, told to its parent through shared memory, so that it can be ended in its midst."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

PHASES = ("starting", "dense", "scoring", "masking", "reconstruction", "fine-tuning", "evaluation", "saving")
_LENGTH = 1 + 2 * len(PHASES)


class Phases:
    """Of one process at a time: the phase that it is in, and of each how often and how long it was in it."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8 * _LENGTH)
        self._numbers = np.frombuffer(self._memory, dtype=np.int64)

    def reset(self) -> None:
        """For the next process."""
        self._numbers[:] = 0
        self._numbers[1] = 1

    @property
    def now(self) -> str:
        """Where it is."""
        return PHASES[int(self._numbers[0])]

    def visits(self, phase: str) -> int:
        """How often it has been entered."""
        return int(self._numbers[1 + PHASES.index(phase)])

    def seconds(self, phase: str) -> float:
        """How long it took until now, all visits together."""
        return float(self._numbers[1 + len(PHASES) + PHASES.index(phase)]) / 1e9

    def wait(self, process: int, phase: str, visit: int, limit: float) -> bool:
        """Until a process is in this phase for the n-th time; False if it ended before."""
        until = time.monotonic() + limit
        while self.visits(phase) < visit:
            if time.monotonic() > until or os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return False
            time.sleep(0.0002)
        return True

    def watch(self) -> None:
        """Note the phases of this process from now on; called in the child."""
        from pytorch_lightning import Trainer
        from pytorch_lightning.loops.evaluation_loop import _EvaluationLoop

        from lightning_prune import files
        from lightning_prune.callbacks import masking, reconstruction, scoring
        from lightning_prune.criteria.scorer import Scorer
        from lightning_prune.reconstruction.masks import MaskHandle

        self._since = time.perf_counter_ns()
        pruned = [False]

        def train(original: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **options: Any) -> Any:
                return self._within("fine-tuning" if pruned[0] else "dense", original, args, options)

            return run

        def during(phase: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
            def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
                def run(*args: Any, **options: Any) -> Any:
                    pruned[0] |= phase == "masking"
                    return self._within(phase, original, args, options)

                return run

            return wrap

        def written(original: Callable[..., Any]) -> Callable[..., Any]:
            def run(path: Any) -> Any:
                return _Within(self, original(path))

            return run

        from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop

        _wrap(_TrainingEpochLoop, "run", train)
        _wrap(_EvaluationLoop, "run", during("evaluation"))
        _wrap(Trainer, "save_checkpoint", during("saving"))
        _wrap(scoring.ScoringCallback, "_score", during("scoring"))
        _wrap(Scorer, "update", during("scoring"))
        _wrap(Scorer, "compute", during("scoring"))
        _wrap(masking.MaskingCallback, "_mask", during("masking"))
        _wrap(MaskHandle, "apply_", during("masking"))
        _wrap(reconstruction.ReconstructionCallback, "_reconstruct_when_masked", during("reconstruction"))
        _wrap(import_module("lightning_prune.cli.prune"), "reconstruct_", during("reconstruction"))
        for writer in ("write_onnx", "write_program"):
            _wrap(import_module("lightning_prune.export.writing"), writer, during("saving"))
        _wrap_everywhere(files.atomic, written)
        _wrap_everywhere(files.append_line, during("saving"))

    def _enter(self, phase: str) -> int:
        before = int(self._numbers[0])
        self._move(PHASES.index(phase))
        self._numbers[1 + PHASES.index(phase)] += 1
        return before

    def _move(self, to: int) -> None:
        now = time.perf_counter_ns()
        self._numbers[1 + len(PHASES) + int(self._numbers[0])] += now - self._since
        self._since = now
        self._numbers[0] = to

    def _within(self, phase: str, function: Callable[..., Any], args: Any, options: Any) -> Any:
        before = self._enter(phase)
        try:
            return function(*args, **options)
        finally:
            self._move(before)


class _Within:
    """A context manager that is a visit of "saving"."""

    def __init__(self, phases: Phases, inner: Any) -> None:
        self.phases, self.inner = phases, inner

    def __enter__(self) -> Any:
        self.before = self.phases._enter("saving")
        return self.inner.__enter__()

    def __exit__(self, *error: Any) -> Any:
        try:
            return self.inner.__exit__(*error)
        finally:
            self.phases._move(self.before)


def _wrap(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    setattr(owner, name, wrap(getattr(owner, name)))


def _wrap_everywhere(function: Callable[..., Any], wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """In every module of the package that has imported it by name."""
    import sys

    wrapped = wrap(function)
    for name, module in list(sys.modules.items()):
        if name.startswith("lightning_prune") and vars(module).get(function.__name__) is function:
            setattr(module, function.__name__, wrapped)
