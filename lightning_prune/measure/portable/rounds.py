"""Timing many prepared programs in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

WARMUP, LEAST, MOST = 2, 10, 41  # rounds
STABLE, SHARE = 0.04, 0.9  # largest difference, relative, and in how many of the programs


def time_in_turns(
    programs: Sequence[Callable[[], object]], clock: Callable[[], float] = time.perf_counter, least: int = LEAST
) -> list[float]:
    """Milliseconds of each: the lower decile over rounds in which all run once, until it is stable.

    In turns, so that each finds its weights outside the caches, as in a network that does not fit into them, and that
    whatever else the machine does falls on all alike. The lower decile, since that can only add.

    >>> ticks = iter(range(1000))
    >>> time_in_turns([lambda: None, lambda: next(ticks)], clock=lambda: next(ticks))
    [1000.0, 2000.0]
    """
    for _ in range(WARMUP):
        for run in programs:
            run()
    rounds: list[list[float]] = []
    while len(rounds) < MOST:
        spent = []
        for run in programs:
            started = clock()
            run()
            spent.append(1e3 * (clock() - started))
        rounds.append(spent)
        if len(rounds) >= least and _stable(np.array(rounds)):
            break
    return [float(decile) for decile in np.percentile(np.array(rounds), 10, axis=0)]


def _stable(rounds: np.ndarray) -> bool:
    """Whether every second round says the same as the others, of most programs."""
    even, odd = np.percentile(rounds[::2], 10, axis=0), np.percentile(rounds[1::2], 10, axis=0)
    return bool(np.mean(np.abs(even - odd) <= STABLE * np.minimum(even, odd)) >= SHARE)
