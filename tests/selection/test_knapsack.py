"""The knapsack of widths: against all choices, with a bound that holds, where more channels may take less time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from lightning_prune.measure.latency_table import LatencyTable
from lightning_prune.measure.layer_calls import LayerKind
from lightning_prune.measure.time_model import TimedLayer, Width
from lightning_prune.selection import knapsack as knapsack_module
from lightning_prune.selection.elimination import Elimination, Factor
from lightning_prune.selection.knapsack import Knapsack
from lightning_prune.selection.table_widths import steps

KIND = LayerKind("conv", kernel=(1, 1), size=(1, 1))


class Rough(LatencyTable):
    """Random times, more or less growing, with steps where more channels take less time."""

    def __init__(self, rng: np.random.Generator, most: int) -> None:
        grown = np.multiply.outer(np.arange(most + 1), np.arange(most + 1)) + 5.0
        vars(self).update(_times=grown * rng.uniform(0.6, 1.4, grown.shape))  # a dataclass, and frozen

    def time(self, kind, channels_in, channels_out):
        return self._times[channels_in, channels_out]


class Instance:
    """Some groups, and layers between them: chains, additions, concatenations, depthwise ones."""

    def __init__(self, seed: int, groups: int = 4, layers: int = 6, most: int = 3) -> None:
        rng = np.random.default_rng(seed)
        sizes = {f"g{n}": int(rng.integers(3, 9)) for n in range(groups)}
        self.widths = {n: sorted({size, *rng.integers(1, size + 1, 4).tolist()}) for n, size in sizes.items()}
        self.values = {n: np.sort(rng.uniform(0, 10, len(own))).tolist() for n, own in self.widths.items()}
        table = Rough(rng, 64)
        self.layers = []
        for n in range(layers):
            sides = []
            for _ in range(2):
                names = rng.choice(list(sizes), int(rng.integers(0, most + 1)), replace=False)
                parts = {str(name): (int(rng.integers(1, 3)), sizes[str(name)]) for name in names}
                sides.append(Width(1 + sum(times * size for times, size in parts.values()), parts))
            self.layers.append(TimedLayer(f"l{n}", KIND, *sides, False, 1, table))

    def time(self, kept: dict[str, int]) -> float:
        return float(sum(layer.at(kept) for layer in self.layers))

    def value(self, kept: dict[str, int]) -> float:
        return sum(self.values[name][self.widths[name].index(width)] for name, width in kept.items())

    def all(self) -> list[tuple[float, float]]:
        """(time, value) of every choice."""
        choices = (dict(zip(self.widths, own, strict=True)) for own in itertools.product(*self.widths.values()))
        return [(self.time(kept), self.value(kept)) for kept in choices]

    def knapsack(self) -> Knapsack:
        return Knapsack(self.widths, self.values, self.layers)


@pytest.mark.parametrize("cells", [10**6, 30, 6, 1], ids=["exact", "some relaxed", "more", "all"])
@pytest.mark.parametrize("seed", range(12))
def test_the_bound_holds_and_the_choice_is_close_to_the_best_of_all(monkeypatch, seed: int, cells: int) -> None:
    monkeypatch.setattr(knapsack_module, "CELLS", cells)
    instance = Instance(seed)
    knapsack, every = instance.knapsack(), instance.all()
    times = [time for time, _ in every]
    assert knapsack.relaxed > 0 or cells > 1
    for budget in np.quantile(times, [0.02, 0.2, 0.5, 0.9]).tolist():
        best = max(value for time, value in every if time <= budget)
        found = knapsack.solve(budget)
        assert found.time == pytest.approx(instance.time(found.kept))
        assert found.value == pytest.approx(instance.value(found.kept))
        assert found.time <= budget
        assert found.value <= best + 1e-9 <= found.bound + 2e-9
        assert found.value >= (0.85 if knapsack.relaxed else 0.93) * best
        assert found.gap == pytest.approx(1 - found.value / found.bound)


def test_most_choices_are_the_best_of_all() -> None:
    best = 0
    for seed in range(30):
        instance = Instance(seed)
        every = instance.all()
        budget = float(np.quantile([time for time, _ in every], 0.4))
        best += instance.knapsack().solve(budget).value >= max(v for t, v in every if t <= budget) - 1e-9
    assert best >= 27


def test_the_least_time_is_found_whatever_it_is_worth() -> None:
    for seed in range(20):
        instance = Instance(seed)
        least = instance.knapsack().least()
        assert least.time == pytest.approx(min(time for time, _ in instance.all()))
        assert instance.knapsack().solve(0.9 * least.time).kept == least.kept  # the budget cannot be met
        assert instance.knapsack().solve(least.time).time <= least.time * (1 + 1e-9)


def test_a_budget_for_everything_keeps_everything() -> None:
    instance = Instance(3)
    everything = {name: own[-1] for name, own in instance.widths.items()}
    found = instance.knapsack().solve(instance.time(everything))
    assert found.kept == everything
    assert found.gap == 0


def test_more_channels_are_kept_where_they_take_less_time() -> None:
    class Awkward(LatencyTable):
        """Odd widths take twice as long."""

        def __init__(self) -> None:
            """Nothing is read."""

        def time(self, kind, channels_in, channels_out):
            return np.asarray(channels_out) * np.where(np.asarray(channels_out) % 2, 2.0, 1.0)

    out = Width(8, {"a": (1, 8)})
    layer = TimedLayer("w", KIND, Width(3, {}), out, False, 1, Awkward())
    values = np.linspace(1, 1.1, 8)  # hardly worth anything
    assert Knapsack({"a": range(1, 9)}, {"a": values}, [layer]).solve(7.0).kept == {"a": 6}


def test_elimination_finds_the_maximum_of_tables_over_few_variables() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        sizes = rng.integers(1, 4, 5).tolist()
        scopes = [tuple(sorted(rng.choice(5, n, replace=False).tolist())) for n in (1, 2, 2, 3, 0)]
        factors = [Factor(scope, rng.normal(size=[sizes[v] for v in scope])) for scope in scopes]
        total, choice = Elimination(sizes, scopes).maximum(factors)
        sums = {
            point: sum(float(f.table[tuple(point[v] for v in f.scope)]) for f in factors)
            for point in itertools.product(*map(range, sizes))
        }
        assert total == pytest.approx(max(sums.values()))
        assert sums[tuple(choice)] == pytest.approx(total)


def test_a_chain_is_eliminated_in_tables_of_two_variables() -> None:
    order = Elimination([10] * 20, [(n, n + 1) for n in range(19)])
    assert order.cells == 100
    assert len(order.widest) == 2


# Which widths it chooses among


def test_widths_that_take_as_long_as_larger_ones_are_left_out() -> None:
    widths = np.arange(1, 65)
    lanes = np.ceil(widths / 16) * 1.0
    assert widths[steps(widths, lanes)].tolist() == [16, 32, 48, 64]
    lanes[widths == 64] = 2.5  # all of them take less than three quarters
    assert widths[steps(widths, lanes)].tolist() == [16, 32, 64]


def test_of_many_widths_the_ones_before_steps_remain() -> None:
    widths = np.arange(1, 513)
    times = np.ceil(widths / 32) + 1e-3 * widths
    left = widths[steps(widths, times, most=32)]
    assert len(left) <= 34
    assert {*range(32, 513, 32)} <= {*left.tolist()}
    assert left[0] == 1
