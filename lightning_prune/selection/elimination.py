"""The maximum of a sum of tables over few variables each: variable elimination (max-plus)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

CELLS = 2**20  # of the largest table that is made


@dataclass(frozen=True, eq=False)
class Factor:
    """A table over some variables.

    Attributes:
        scope: the variables, ascending.
        table: an axis for each.
    """

    scope: tuple[int, ...]
    table: NDArray[np.float64]


class Elimination:
    """In which order variables are eliminated: next the one whose table with its neighbours is smallest.

    Args:
        sizes: how many values each variable has.
        scopes: of the factors to come.

    Attributes:
        cells: of the largest table it takes.
        widest: the variables of that table.
    """

    def __init__(self, sizes: Sequence[int], scopes: Iterable[Sequence[int]]) -> None:
        self._sizes = list(sizes)
        near: list[set[int]] = [{variable} for variable in range(len(sizes))]
        for scope in scopes:
            for variable in scope:
                near[variable].update(scope)
        self.cells = 1
        self.widest: tuple[int, ...] = ()
        self.order: list[int] = []
        left = set(range(len(sizes)))
        while left:
            variable = min(left, key=lambda v: (self._cells(near[v]), v))
            if (cells := self._cells(near[variable])) > self.cells:
                self.cells, self.widest = cells, tuple(near[variable])
            self.order.append(variable)
            left.remove(variable)
            others = near[variable] - {variable}
            for other in others:
                near[other] = (near[other] | others) - {variable}
        self._rank = {variable: rank for rank, variable in enumerate(reversed(self.order))}

    def maximum(self, factors: Iterable[Factor]) -> tuple[float, NDArray[np.int64]]:
        """The largest sum, and the value of every variable there."""
        buckets: list[list[Factor]] = [[] for _ in self._sizes]  # by the variable that is eliminated first
        constant = 0.0
        for factor in factors:
            by_rank = sorted(factor.scope, key=self._rank.__getitem__)
            table = factor.table.transpose([factor.scope.index(variable) for variable in by_rank])
            if by_rank:
                buckets[by_rank[-1]].append(Factor(tuple(by_rank), table))
            else:
                constant += float(table)
        picks: list[tuple[int, tuple[int, ...], NDArray[np.int64]]] = []
        for variable in self.order:
            union = sorted({v for factor in buckets[variable] for v in factor.scope}, key=self._rank.__getitem__)
            total = np.zeros([self._sizes[v] for v in union])
            for factor in buckets[variable]:
                total += factor.table.reshape([self._sizes[v] if v in factor.scope else 1 for v in union])
            picks.append((variable, tuple(union[:-1]), total.argmax(-1)))
            rest = total.max(-1)
            if union[:-1]:
                buckets[union[-2]].append(Factor(tuple(union[:-1]), rest))
            else:
                constant += float(rest)
        choice = np.zeros(len(self._sizes), dtype=np.int64)
        for variable, scope, pick in reversed(picks):
            choice[variable] = pick[tuple(choice[v] for v in scope)]
        return constant, choice

    def _cells(self, variables: Iterable[int]) -> int:
        return prod(self._sizes[variable] for variable in variables)
