"""How long a forward pass takes: wall time, models in turns, with the spread."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from lightning_prune.engines import Engine, Program, engine_from
from lightning_prune.errors import PruningError, TraceError
from lightning_prune.model_state.preservation import preserved

T = TypeVar("T")
MOST_THREADS = 64  # that any machine grants
TURN = 4  # passes that a model has in its turn, without the clock and then with it
SETTLED, SETTLED_ROUNDS, SETTLED_S = 0.03, 30, 2.0  # a pass this much faster than before was not warm yet

Models = Mapping[str, tuple[nn.Module, Any]]  # {name: (model, example inputs)}


@dataclass(frozen=True)
class Latency:
    """Wall time of one forward pass in milliseconds.

    Attributes:
        median: over the repeats.
        iqr: distance of the quartiles, the spread.
        samples: every repeat.

    Example:
        >>> Latency.of([4.0, 8.0, 6.0, 1.0])
        Latency(median=5.0, iqr=3.25)
    """

    median: float
    iqr: float
    samples: tuple[float, ...] = field(repr=False)

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Latency:
        """From every repeat."""
        low, median, high = np.percentile(milliseconds, (25, 50, 75)).tolist()
        return cls(median, high - low, tuple(milliseconds))


def measure_latency(
    model: nn.Module,
    example_inputs: Any,
    *,
    engine: str | Engine = "eager",
    warmup: int | None = None,
    repeats: int = 10,
) -> Latency:
    """Time forward passes of one model in eval mode without gradients, in milliseconds; see `thread_count`.

    Args:
        model: left as it is.
        example_inputs: the whole of it is one pass.
        engine: what runs it, see `lightning_prune.engines`.
        warmup: passes before the clock runs; None: until they take the same time.
        repeats: passes timed.

    Raises:
        PruningError: no repeats, or a model on the meta device, which computes nothing.
        EngineError: the engine is not installed or cannot run the model.
        TraceError: the model does not run on the inputs.

    Example:
        >>> latency = measure_latency(nn.Linear(4, 2), torch.zeros(1, 4), repeats=3)
        >>> len(latency.samples), min(latency.samples) <= latency.median
        (3, True)
    """
    return compare_latency({"": (model, example_inputs)}, engine=engine, warmup=warmup, repeats=repeats)[""]


def compare_latency(
    models: Models, *, engine: str | Engine = "eager", warmup: int | None = None, repeats: int = 10
) -> dict[str, Latency]:
    """Time several models in turns, in milliseconds: whatever else the machine does falls on all of them alike.

    A turn is four passes that are not timed and up to four that are: the model before has left the caches full of its
    own weights, where a deployed model finds its own, and after one pass alone a small model is up to 8 % slower still.

    Args:
        models: {name: (model, example inputs)}.
        engine: what runs them, see `lightning_prune.engines`.
        warmup: rounds before the clock runs; None: until each model takes the same time.
        repeats: rounds timed.

    Raises:
        PruningError: no repeats, or a model on the meta device, which computes nothing.
        EngineError: the engine is not installed or cannot run a model.
        TraceError: a model does not run on its inputs.

    Example:
        >>> x = torch.zeros(64, 500)
        >>> found = compare_latency({"wide": (nn.Linear(500, 5000), x), "narrow": (nn.Linear(500, 5), x)})
        >>> found["narrow"].median < found["wide"].median
        True
    """
    engine = engine_from(engine)
    for name, (model, _) in models.items():
        if any(p.is_meta for p in model.parameters()):
            raise PruningError(f"model {name!r} is on the meta device, where nothing is computed: no time to measure")
    with in_eval_mode(models):
        prepared = {name: (engine.prepare(model, inputs), inputs) for name, (model, inputs) in models.items()}
        return compare_programs(prepared, warmup=warmup, repeats=repeats)


def compare_programs(
    programs: Mapping[str, tuple[Program, Any]], *, warmup: int | None = None, repeats: int = 10
) -> dict[str, Latency]:
    """The same for models that engines have prepared, perhaps different ones: {name: (program, inputs)}."""

    def timer(name: str) -> float:
        return timed_pass(*programs[name])

    if warmup is None:
        warm_up(programs, timer)
    found = in_turns(programs, timer, timer, warmup or 0, repeats)
    return {name: Latency.of(milliseconds) for name, milliseconds in found.items()}


def warm_up(names: Iterable[str], timer: Callable[[str], float]) -> None:
    """Rounds until each one's fastest of three passes is no faster than the three before; 2 s or 30 rounds suffice."""
    names, ended = list(names), time.perf_counter() + SETTLED_S
    passes: dict[str, list[float]] = {name: [] for name in names}
    while len(passes[names[0]]) < SETTLED_ROUNDS and time.perf_counter() < ended:
        for name, times in passes.items():
            times.append(timer(name))
        if all(len(t) >= 6 and min(t[-3:]) > (1 - SETTLED) * min(t[-6:-3]) for t in passes.values()):
            return


def in_turns(
    names: Iterable[str],
    before: Callable[[str], object],
    timer: Callable[[str], T],
    warmup: int,
    repeats: int,
) -> dict[str, list[T]]:
    """What ``timer(name)`` finds about each that takes its turn: {name: (repeats,)}; ``before`` begins a turn."""
    if warmup < 0 or repeats < 1:
        raise PruningError(f"warmup must be at least 0 and repeats at least 1, got {warmup} and {repeats}")
    found: dict[str, list[T]] = {name: [] for name in names}
    for name in warmup * list(found):
        before(name)
    for done in range(0, repeats, TURN):
        for name, values in found.items():
            for _ in range(TURN if len(found) > 1 else 0):
                before(name)
            values += [timer(name) for _ in range(min(TURN, repeats - done))]
    return found


@contextmanager
def in_eval_mode(models: Models) -> Iterator[None]:
    """All of them, for a while."""
    with ExitStack() as stack:
        for model, _ in models.values():
            stack.enter_context(preserved(model))
            model.eval()
        yield


def timed_pass(program: Program, inputs: Any) -> float:
    """Milliseconds of one pass."""
    started = time.perf_counter()
    try:
        program.run(inputs)
    except PruningError:
        raise
    except Exception as error:
        raise TraceError(f"the model does not run on the example inputs: {type(error).__name__}: {error}") from error
    return 1e3 * (time.perf_counter() - started)


@contextmanager
def thread_count(threads: int | None) -> Iterator[int]:
    """So many threads of the CPU for whatever is timed inside, and how many that is; None leaves them as they are.

    Raises:
        PruningError: less than one, or many more than the machine has cores.

    Example:
        >>> with thread_count(1) as threads:
        ...     latency = measure_latency(nn.Linear(4, 2), torch.zeros(1, 4))
        >>> threads
        1
    """
    before = torch.get_num_threads()
    threads = before if threads is None else threads
    most = max(MOST_THREADS, 4 * (os.cpu_count() or 1))
    if not 1 <= threads <= most:  # so many that the system refuses one end the process
        raise PruningError(f"threads must be at least 1 and at most {most} on this machine, got {threads}")
    try:
        torch.set_num_threads(threads)
        yield threads
    finally:
        torch.set_num_threads(before)
