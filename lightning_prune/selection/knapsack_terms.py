"""The time of one layer over the widths of the groups on its two sides: a table, or relaxed where it were too large."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_prune.measure.time_model import TimedLayer, Width

Floats = NDArray[np.float64]
Widths = NDArray[np.int64]


class Term:
    """A layer and the groups that its time depends on.

    Attributes:
        scope: their numbers, ascending.
        relaxed: which of its sides, in (0) and out (1), are relaxed.
        rest: the groups of the sides that are not.
    """

    def __init__(self, layer: TimedLayer, numbers: Mapping[str, int], widths: Sequence[NDArray[np.int64]]) -> None:
        self.layer, self._numbers, self.widths = layer, numbers, widths
        self.sides = [_members(side, numbers) for side in (layer.into, layer.out)]
        self.scope = self.rest = tuple(sorted({*self.sides[0], *self.sides[1]}))
        self.relaxed: tuple[int, ...] = ()

    @property
    def cells(self) -> int:
        """Of the table over the rest."""
        return prod(len(self.widths[number]) for number in self.rest)

    @property
    def entries(self) -> int:
        """Of the table that a relaxed layer keeps: over the rest, and over every width of its relaxed sides."""
        return self.cells * prod(int(np.max(self.width(side, ()))) for side in self.relaxed)

    def relax(self) -> None:
        """Relax the side of more groups, or the other one too."""
        more = int(len(self.sides[1]) > len(self.sides[0]))
        self.relaxed = (0, 1) if self.relaxed else (more,)
        self.rest = () if len(self.relaxed) == 2 else tuple(sorted(self.sides[1 - more]))

    def width(self, side: int, scope: Sequence[int]) -> Any:
        """Channels on a side over the widths of all groups of ``scope``, an axis for each."""
        width = (self.layer.into, self.layer.out)[side]
        names = {number: name for name, number in self._numbers.items() if number in scope}
        axes = {n: [-1 if m == n else 1 for m in scope] for n in scope}
        return width.of({names[n]: self.widths[n].reshape(axes[n]) for n in scope})

    def exact(self, other: Exact | None) -> Exact:
        """Its table, added to another one's over the same groups."""
        shape = [len(self.widths[number]) for number in self.scope]
        times = self.layer.time(self.width(0, self.scope), self.width(1, self.scope))
        table = np.broadcast_to(times, shape)
        return Exact(self.scope, np.array(table) if other is None else other.times + table)


class Exact:
    """Times over the widths of few groups."""

    def __init__(self, scope: tuple[int, ...], times: Floats) -> None:
        self.scope, self.times = scope, times

    def time(self, choice: Widths) -> float:
        """At one choice."""
        return float(self.times[tuple(choice[list(self.scope)])])

    def curve(self, choice: Widths, number: int) -> Floats:
        """If one group takes each of its widths."""
        return self.times[tuple(slice(None) if n == number else choice[n] for n in self.scope)]


class Relaxed:
    r"""A layer whose width on a side is a variable :math:`A` of its own, at a price for differing from the groups.

    For any slope :math:`\mu`, :math:`T(\sum_g k_g n_g, o) \ge \min_A [T(A, o) - \mu A] + \mu \sum_g k_g n_g`: the right
    side is a table over the other side's groups and a linear term of each on this one.
    """

    def __init__(self, term: Term) -> None:
        self.scope, self.rest, self._term, self._relaxed = term.scope, term.rest, term, term.relaxed
        self._widths = term.widths
        self._entries = term.sides
        most = [(term.layer.into, term.layer.out)[side].dense for side in term.relaxed]
        least = [int(np.min(term.width(side, ())) - self._lost(side)) for side in term.relaxed]
        self._least = least
        self._levels = [np.arange(low, high + 1) for low, high in zip(least, most, strict=True)]
        shape = [len(levels) for levels in self._levels] + [len(self._widths[number]) for number in self.rest]
        grids: list[Any] = [None, None]
        for axis, side in enumerate(term.relaxed):
            grids[side] = self._levels[axis].reshape([-1 if other == axis else 1 for other in range(len(shape))])
        for side in {0, 1} - set(term.relaxed):
            grids[side] = np.asarray(term.width(side, self.rest))[None]
        self._times = np.array(np.broadcast_to(term.layer.time(*grids), shape))
        self.slopes = [0.0] * len(term.relaxed)
        self._at: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
        self._rests: Any = None

    def _lost(self, side: int) -> int:
        dense = {n: int(self._widths[n][-1]) for n in self._entries[side]}
        return sum(times * (dense[n] - int(self._widths[n][0])) for n, times in self._entries[side].items())

    def level(self, axis: int, choice: Widths) -> int:
        """Channels on a relaxed side, counted from the least."""
        entries = self._entries[self._relaxed[axis]]
        return sum(times * int(self._widths[n][choice[n]] - self._widths[n][0]) for n, times in entries.items())

    def time(self, choice: Widths) -> float:
        """At one choice, not relaxed."""
        where = [self.level(axis, choice) for axis in range(len(self._levels))]
        return float(self._times[tuple(where) + tuple(choice[list(self.rest)])])

    def curve(self, choice: Widths, number: int) -> Floats:
        """If one group takes each of its widths, not relaxed."""
        own = self._widths[number]
        where: list[Any] = []
        for axis, side in enumerate(self._relaxed):
            moved = self._entries[side].get(number, 0) * (own - own[choice[number]])
            where.append(self.level(axis, choice) + moved)
        where += [np.arange(len(own)) if n == number else choice[n] for n in self.rest]
        return np.asarray(np.broadcast_to(self._times[tuple(where)], own.shape))

    def lower(self) -> tuple[Floats, dict[int, Floats], float]:
        """A bound from below: over the rest, of each group on the relaxed sides, and a constant."""
        axes = len(self._levels)
        priced = self._times
        constant = 0.0
        for axis, (slope, levels) in enumerate(zip(self.slopes, self._levels, strict=True)):
            priced = priced - slope * levels.reshape([-1 if other == axis else 1 for other in range(priced.ndim)])
            constant += slope * self._least[axis]
        flat = priced.reshape(-1, *priced.shape[axes:])
        self._at, self._rests = flat.argmin(0), flat.min(0)
        linear: dict[int, Floats] = {}
        for slope, side in zip(self.slopes, self._relaxed, strict=True):
            for n, times in self._entries[side].items():
                own = self._widths[n]
                linear[n] = linear.get(n, np.zeros(len(own))) + slope * times * (own - own[0])
        return self._rests, linear, constant

    def bound(self, choice: Widths) -> float:
        """What `lower` comes to at one choice."""
        rest, linear, constant = self.lower()
        at = [float(times[choice[number]]) for number, times in linear.items()]
        return float(rest[tuple(choice[list(self.rest)])]) + constant + sum(at)

    def disagreement(self, choice: Widths) -> list[float]:
        """Along each relaxed side: channels of the variable that the last `lower` chose, more than the groups have."""
        shape = [len(levels) for levels in self._levels]
        chosen = np.unravel_index(int(self._at[tuple(choice[list(self.rest)])]), shape)
        return [float(chosen[axis] - self.level(axis, choice)) for axis in range(len(shape))]

    def linearise(self, choice: Widths) -> None:
        """Set the slopes to those of the times around a choice."""
        where = [self.level(axis, choice) for axis in range(len(self._levels))]
        rest = tuple(choice[list(self.rest)])
        for axis, levels in enumerate(self._levels):
            wide = max(len(levels) // 8, 1)
            low, high = max(where[axis] - wide, 0), min(where[axis] + wide, len(levels) - 1)
            place = (*where[:axis], slice(None), *where[axis + 1 :], *rest)
            along = self._times[place]
            ends = [float(along[at]) for at in (low, high)]
            self.slopes[axis] = (ends[1] - ends[0]) / (high - low) if high > low else 0.0


def _members(width: Width, numbers: Mapping[str, int]) -> dict[int, int]:
    """{group: channels that go with one of its own}."""
    return {numbers[name]: times for name, (times, _) in width.parts.items() if name in numbers}
