"""The widths of most value within a time that pairs of widths make together: a knapsack, with a bound on its gap."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_prune.measure.time_model import TimedLayer
from lightning_prune.selection.elimination import CELLS, Elimination, Factor
from lightning_prune.selection.knapsack_terms import Exact, Relaxed, Term

Floats = NDArray[np.float64]
Widths = NDArray[np.int64]  # which of its widths every group takes

EXACTLY = 1e-9  # share by which two values may differ and be the same
LINES, ROUNDS = 40, 60  # tries for the price of a millisecond; steps of the multipliers
ENTRIES = 2**22  # of a relaxed layer's table
PAIRS = 256  # exchanges that are looked at closely
MOVES = 400


@dataclass(frozen=True)
class Packing:
    """What a knapsack holds.

    Attributes:
        kept: {group: width}.
        value: the sum of the groups' values.
        time: milliseconds by the table.
        bound: no choice among the widths has more value within the budget.
    """

    kept: dict[str, int]
    value: float
    time: float
    bound: float

    @property
    def gap(self) -> float:
        """Share of the bound that may be missing."""
        return max(self.bound - self.value, 0.0) / self.bound if self.bound > 0 else 0.0


class Knapsack:
    r"""Chooses one width for every group: the most value within a budget of time.

    .. math:: \max_n \sum_g V_g(n_g) \quad\text{with}\quad T(n) = \sum_l T_l(\text{in}_l(n), \text{out}_l(n)) \le B

    A layer's time depends on the groups on both its sides, so this is HALP's knapsack (Shen et al., NeurIPS 2022)
    without its assumption that the other side stays as it is. For a price :math:`\lambda` of a millisecond,
    :math:`L(\lambda) = \max_n V(n) - \lambda (T(n) - B)` is found exactly by variable elimination and bounds every
    choice within the budget from above; the least :math:`L` is searched for. The solutions met on the way are mended
    and improved by moves of one and of two groups. A layer that reads too many groups at once (concatenations) is
    relaxed: its width in becomes a variable of its own, tied to the groups by a price, which only raises the bound.

    Args:
        widths: {group: those it may take, ascending}.
        values: {group: value of each}, ascending.
        layers: their times; groups that are not among ``widths`` keep all their channels.
    """

    def __init__(
        self, widths: Mapping[str, ArrayLike], values: Mapping[str, ArrayLike], layers: Iterable[TimedLayer]
    ) -> None:
        self._names = list(widths)
        self._widths = [np.asarray(widths[name], dtype=np.int64) for name in self._names]
        self._values = [np.asarray(values[name], dtype=np.float64) for name in self._names]
        sizes = [len(own) for own in self._widths]
        numbers = {name: number for number, name in enumerate(self._names)}
        self._fixed, open_ = 0.0, []
        for layer in layers:
            term = Term(layer, numbers, self._widths)
            if term.scope:
                open_.append(term)
            else:
                self._fixed += float(layer.at({}))
        for term in open_:
            while len(term.relaxed) < 2 and (term.cells > CELLS or term.entries > ENTRIES):
                term.relax()
        while (order := Elimination(sizes, [term.rest for term in open_])).cells > CELLS:
            within = [term for term in open_ if len(term.rest) > 1 and set(term.rest) <= set(order.widest)]
            widest = within or [term for term in open_ if len(term.rest) > 1]
            if not widest:
                break
            max(widest, key=lambda term: term.cells).relax()
        self._order = order
        by_scope: dict[tuple[int, ...], Exact] = {}
        for term in open_:
            if not term.relaxed:
                by_scope[term.scope] = term.exact(by_scope.get(term.scope))
        self._exact = list(by_scope.values())
        self._relaxed = [Relaxed(term) for term in open_ if term.relaxed]
        self._terms: list[Exact | Relaxed] = [*self._exact, *self._relaxed]
        self._of = [[term for term in self._terms if number in term.scope] for number in range(len(sizes))]
        self._full = np.array([size - 1 for size in sizes])
        self._least: Widths | None = None

    @property
    def relaxed(self) -> int:
        """How many layers are relaxed in the bound; without any, only the budget is."""
        return len(self._relaxed)

    def least(self) -> Packing:
        """The least time that was found, whatever the value."""
        if self._least is None:
            scale = sum(float(values[-1]) for values in self._values) or 1.0
            choice = self._best(1e9 * scale / max(self._time(self._full), 1e-9))[0]
            self._least = self._lightened(choice)
        return self._packing(self._least, sum(float(values[-1]) for values in self._values))

    def solve(self, budget: float) -> Packing:
        """The most value found within so many milliseconds; of `least` if even that takes more."""
        full, least = self._full, self.least()
        if self._time(full) <= budget:
            return self._packing(full, self._value(full))
        if least.time > budget:
            return least
        assert self._least is not None
        start = self._improved(self._least, budget)
        best, bound = start, self._value(full)
        for relaxed in self._relaxed:
            relaxed.linearise(best)
        price = 0.0
        for last in (False, True):
            found, price, value = self._line(budget)
            bound = min(bound, value)
            for choice in found:
                mended = self._improved(self._mended(choice, budget), budget)
                best = max(best, mended, key=self._value)
            if not self._relaxed or last:
                break
            bound = min(bound, self._tightened(price, budget, best))
        return self._packing(best, bound)

    # The bound

    def _best(self, price: float) -> tuple[Widths, float, float, float]:
        """For a price: the best choice, its value, its time as the relaxed layers have it, and the difference."""
        unary = [np.array(values) for values in self._values]
        factors = [Factor(term.scope, -price * term.times) for term in self._exact]
        constant = self._fixed
        for term in self._relaxed:
            rest, linear, free = term.lower()
            constant += free
            for number, times in linear.items():
                unary[number] = unary[number] - price * times
            factors.append(Factor(term.rest, -price * rest))
        factors += [Factor((number,), values) for number, values in enumerate(unary)]
        total, choice = self._order.maximum(factors)
        total -= price * constant
        value = self._value(choice)
        return choice, value, (value - total) / price if price else self._time(choice), total

    def _line(self, budget: float) -> tuple[list[Widths], float, float]:
        """The price at which the bound is least, the bound, and the choices on both sides of it."""
        assert self._least is not None
        full = self._full
        below = (self._least, self._value(self._least), self._relaxed_time(self._least))
        above = (full, self._value(full), self._relaxed_time(full))
        if below[2] >= above[2] or above[2] <= budget:
            return [below[0], above[0]], 0.0, above[1]
        bound, price = above[1], 0.0
        for _ in range(LINES):
            trial = (above[1] - below[1]) / (above[2] - below[2])
            choice, value, time, total = self._best(trial)
            reached = total + trial * budget
            if reached < bound:
                bound, price = reached, trial
            if reached <= below[1] + trial * (budget - below[2]) + EXACTLY * abs(above[1]):
                break
            if time <= budget:
                below = choice, value, time
            else:
                above = choice, value, time
        return [below[0], above[0]], price, bound

    def _tightened(self, price: float, budget: float, best: Widths) -> float:
        """The bound after steps of the relaxed layers' prices against their disagreement with the groups."""
        least, kept = np.inf, [list(term.slopes) for term in self._relaxed]
        target = self._value(best)
        for step in range(ROUNDS):
            choice, _, _, total = self._best(price)
            reached = total + price * budget
            if reached < least:
                least, kept = reached, [list(term.slopes) for term in self._relaxed]
            errors = [term.disagreement(choice) for term in self._relaxed]
            norm = price**2 * sum(error**2 for pair in errors for error in pair)
            if not norm or reached <= target:
                break
            size = 1.5 * 0.96**step * (reached - target) / norm
            for term, pair in zip(self._relaxed, errors, strict=True):
                term.slopes = [slope - size * price * error for slope, error in zip(term.slopes, pair, strict=True)]
        for term, slopes in zip(self._relaxed, kept, strict=True):
            term.slopes = slopes
        return float(least)

    # The choice

    def _mended(self, choice: Widths, budget: float) -> Widths:
        """Made to fit, by the moves that lose the least value for the time that they save."""
        choice = choice.copy()
        while (over := self._time(choice) - budget) > 0:
            times, gains = self._moves(choice)
            saved = np.where(times < 0, np.minimum(-times, over), 0.0)
            if not saved.any():
                assert self._least is not None
                return self._least
            with np.errstate(divide="ignore", invalid="ignore"):
                loss = np.where(saved > 0, -gains / saved, np.inf)
            self._move(choice, int(loss.argmin()), times.shape[1])
        return choice

    def _improved(self, choice: Widths, budget: float) -> Widths:
        """More value for what is left of the budget: one group moves, or two do."""
        choice = choice.copy()
        for _ in range(MOVES):
            slack = budget - self._time(choice)
            times, gains = self._moves(choice)
            alone = np.where(times <= slack, gains, -np.inf)
            tiny = EXACTLY * max(self._value(choice), 1e-300)
            if alone.max() > tiny:
                self._move(choice, int(alone.argmax()), times.shape[1])
            elif (pair := self._exchange(choice, budget, times, gains, tiny)) is not None:
                choice = pair
            else:
                break
        return choice

    def _exchange(self, choice: Widths, budget: float, times: Floats, gains: Floats, tiny: float) -> Widths | None:
        """Two groups moved at once, for more value within the budget; None if none of the likely ones is."""
        flat_times, flat_gains = times.ravel(), gains.ravel()
        slack, now = budget - self._time(choice), self._value(choice)
        up, down = np.flatnonzero((flat_gains > 0) & np.isfinite(flat_times)), np.flatnonzero(flat_times < 0)
        both = flat_gains[up][:, None] + flat_gains[down]
        both = np.where(flat_times[up][:, None] + flat_times[down] <= slack, both, -np.inf)
        both[up[:, None] // times.shape[1] == down // times.shape[1]] = -np.inf
        if not both.size:
            return None
        likely = np.argpartition(both.ravel(), -min(PAIRS, both.size))[-PAIRS:]
        for number in likely[np.argsort(-both.ravel()[likely], kind="stable")]:
            if both.ravel()[number] <= tiny:
                return None
            moved = choice.copy()
            for one in (up[number // len(down)], down[number % len(down)]):
                self._move(moved, int(one), times.shape[1])
            if self._time(moved) <= budget and self._value(moved) > now + tiny:
                return moved
        return None

    def _lightened(self, choice: Widths) -> Widths:
        """Moves of one group, as long as they save time."""
        choice = choice.copy()
        for _ in range(MOVES):
            times, _ = self._moves(choice)
            if times.min() >= -EXACTLY * self._time(choice):
                break
            self._move(choice, int(times.argmin()), times.shape[1])
        return choice

    def _moves(self, choice: Widths) -> tuple[Floats, Floats]:
        """(groups, widths): what moving one group to a width adds of time and of value; time is inf for no width."""
        times = np.full((len(choice), int(self._full.max()) + 1), np.inf)
        gains = np.zeros_like(times)
        for number, values in enumerate(self._values):
            curve = sum((term.curve(choice, number) for term in self._of[number]), np.zeros(len(values)))
            times[number, : len(values)] = curve - curve[choice[number]]
            gains[number, : len(values)] = values - values[choice[number]]
        return times, gains

    def _move(self, choice: Widths, flat: int, row: int) -> None:
        choice[flat // row] = flat % row

    def _time(self, choice: Widths) -> float:
        return self._fixed + sum(term.time(choice) for term in self._terms)

    def _relaxed_time(self, choice: Widths) -> float:
        return self._fixed + sum(t.time(choice) for t in self._exact) + sum(t.bound(choice) for t in self._relaxed)

    def _value(self, choice: Widths) -> float:
        return float(sum(values[number] for values, number in zip(self._values, choice, strict=True)))

    def _packing(self, choice: Widths, bound: float) -> Packing:
        widths = zip(self._names, self._widths, choice, strict=True)
        value = self._value(choice)
        return Packing({n: int(own[j]) for n, own, j in widths}, value, self._time(choice), bound)
