"""How long a forward pass takes: wall time, models in turns, with the spread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from lightning_prune.errors import PruningError
from lightning_prune.measure.counting import run
from lightning_prune.model_state.preservation import preserved

T = TypeVar("T")
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
        Latency(median=5.0, iqr=3.25, samples=(4.0, 8.0, 6.0, 1.0))
    """

    median: float
    iqr: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, milliseconds: Sequence[float]) -> Latency:
        """From every repeat."""
        low, median, high = np.percentile(milliseconds, (25, 50, 75)).tolist()
        return cls(median, high - low, tuple(milliseconds))


def measure_latency(model: nn.Module, example_inputs: Any, *, warmup: int = 2, repeats: int = 10) -> Latency:
    """Time forward passes of one model in eval mode without gradients, in milliseconds; see `thread_count`.

    Args:
        model: left as it is.
        example_inputs: the whole of it is one pass.
        warmup: passes before the clock runs.
        repeats: passes timed.

    Raises:
        PruningError: no repeats, or a model on the meta device, which computes nothing.
        TraceError: the model does not run on the inputs.

    Example:
        >>> latency = measure_latency(nn.Linear(4, 2), torch.zeros(1, 4), repeats=3)
        >>> len(latency.samples), min(latency.samples) <= latency.median
        (3, True)
    """
    return compare_latency({"": (model, example_inputs)}, warmup=warmup, repeats=repeats)[""]


def compare_latency(models: Models, *, warmup: int = 2, repeats: int = 10) -> dict[str, Latency]:
    """Time several models in turns, in milliseconds: whatever else the machine does falls on all of them alike.

    Before each timed pass goes one that is not timed: the model before has left the caches full of its own weights,
    where a deployed model finds its own.

    Args:
        models: {name: (model, example inputs)}.
        warmup: rounds before the clock runs.
        repeats: rounds timed.

    Raises:
        PruningError: no repeats, or a model on the meta device, which computes nothing.
        TraceError: a model does not run on its inputs.

    Example:
        >>> x = torch.zeros(64, 500)
        >>> found = compare_latency({"wide": (nn.Linear(500, 5000), x), "narrow": (nn.Linear(500, 5), x)})
        >>> found["narrow"].median < found["wide"].median
        True
    """
    for name, (model, _) in models.items():
        if any(p.is_meta for p in model.parameters()):
            raise PruningError(f"model {name!r} is on the meta device, where nothing is computed: no time to measure")
    found = in_turns(models, lambda _, *of: timed_pass(*of), warmup, repeats)
    return {name: Latency.of(milliseconds) for name, milliseconds in found.items()}


def in_turns(
    models: Models, timer: Callable[[str, nn.Module, Any], T], warmup: int, repeats: int
) -> dict[str, list[T]]:
    """What ``timer(name, model, inputs)`` finds about models in eval mode that take turns: {name: (repeats,)}."""
    if warmup < 0 or repeats < 1:
        raise PruningError(f"warmup must be at least 0 and repeats at least 1, got {warmup} and {repeats}")
    found: dict[str, list[T]] = {name: [] for name in models}
    with ExitStack() as stack:
        for model, _ in models.values():
            stack.enter_context(preserved(model))
            model.eval()
        for round_ in range(warmup + repeats):
            for name, (model, inputs) in models.items():
                if len(models) > 1:
                    timed_pass(model, inputs)
                value = timer(name, model, inputs)
                if round_ >= warmup:
                    found[name].append(value)
    return found


def timed_pass(model: nn.Module, inputs: Any) -> float:
    """Milliseconds of one pass."""
    device = next((p.device for p in model.parameters() if p.device.type != "cpu"), None)
    with torch.no_grad():  # inference_mode would poison what a model caches for later, such as anchors
        if device is not None:
            torch.accelerator.synchronize(device)
        started = time.perf_counter()
        run(model, inputs)
        if device is not None:
            torch.accelerator.synchronize(device)
        return 1e3 * (time.perf_counter() - started)


@contextmanager
def thread_count(threads: int | None) -> Iterator[int]:
    """So many threads of the CPU for whatever is timed inside, and how many that is; None leaves them as they are.

    Raises:
        PruningError: less than one.

    Example:
        >>> with thread_count(1) as threads:
        ...     latency = measure_latency(nn.Linear(4, 2), torch.zeros(1, 4))
        >>> threads
        1
    """
    before = torch.get_num_threads()
    threads = before if threads is None else threads
    if threads < 1:
        raise PruningError(f"threads must be at least 1, got {threads}")
    try:
        torch.set_num_threads(threads)
        yield threads
    finally:
        torch.set_num_threads(before)
