"""A latency met by a table: the most score kept, corrected by measuring, never slower than the dense model."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn

import lightning_prune as lp
from lightning_prune.engines import Program
from lightning_prune.errors import NoEffectWarning, NotReconstructedWarning, PlanError
from lightning_prune.selection import Budget
from lightning_prune.selection.by_table import MODELS, TableSearch
from lightning_prune.selection.stopwatch import Stopwatch
from tests.criteria.helpers import assert_same, snapshot
from tests.helpers import RandomScores
from tests.selection.tables import Simulated, Steps
from tests.selection.test_budget import wide
from tests.zoo import build, images


def chosen(model: nn.Module, x, selection: Budget, seed: int = 5, **options) -> tuple[lp.Plan, nn.Module]:
    graph = lp.trace(model, x)
    plan = selection.select(graph, RandomScores(graph, seed), model=model, example_inputs=x, **options)
    return plan, lp.reconstruct(model, graph, plan, example_inputs=x)


@pytest.mark.parametrize("share", [0.75, 0.5, 0.35])
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1.7, 0.0), (0.6, 1.0)])
def test_a_latency_is_met_within_five_percent_whatever_the_table_does_not_know(
    monkeypatch, share: float, scale: float, offset: float
) -> None:
    model, x, table = wide(), images(), Steps(lane=2)
    engine = Simulated(monkeypatch, table, scale, offset)
    dense = engine.milliseconds(model, x)
    before = snapshot(model)
    _, small = chosen(model, x, Budget(latency_ms=share * dense, engine=engine, table=table))
    assert_same(before, snapshot(model))
    assert 0.95 * share * dense <= engine.milliseconds(small, x) <= share * dense
    assert engine.prepared <= 1 + MODELS


def test_times_are_relative_to_the_dense_model_s_which_a_busy_machine_slows_too(monkeypatch) -> None:
    model, x, table = wide(), images(), Steps(lane=2)
    engine = Simulated(monkeypatch, table, 1.3, 0.5)
    dense = engine.milliseconds(model, x)
    engine.mood = lambda passes: 1.0 if passes < 40 else 2.0 + passes // 100 % 3 / 4  # once the dense one is timed
    _, small = chosen(model, x, Budget(latency_ms=0.5 * dense, engine=engine, table=table))
    assert 0.95 * 0.5 * dense <= engine.milliseconds(small, x) <= 0.5 * dense


def first_reading(monkeypatch, factor: float) -> None:
    """The first timing of a smaller model comes out wrong by a factor."""
    watched: list[float] = []
    really = Stopwatch.time

    def time(self: Stopwatch, program: Program) -> float:
        watched.append(really(self, program))
        return watched[-1] * (factor if len(watched) == 1 else 1.0)

    monkeypatch.setattr(Stopwatch, "time", time)


def test_a_model_that_was_fast_by_chance_is_timed_again(monkeypatch) -> None:
    model, x, table = wide(), images(), Steps(lane=2)
    engine = Simulated(monkeypatch, table, offset=2.0)
    dense = engine.milliseconds(model, x)
    first_reading(monkeypatch, 0.5)
    _, small = chosen(model, x, Budget(latency_ms=0.3 * dense, engine=engine, table=table))
    assert engine.milliseconds(small, x) <= 0.3 * dense


def test_a_model_that_was_slow_by_chance_does_not_lead_astray(monkeypatch) -> None:
    model, x, table = wide(), images(), Steps(lane=2)
    engine = Simulated(monkeypatch, table)
    dense = engine.milliseconds(model, x)
    first_reading(monkeypatch, 2.5)
    _, small = chosen(model, x, Budget(latency_ms=0.5 * dense, engine=engine, table=table))
    assert 0.95 * 0.5 * dense <= engine.milliseconds(small, x) <= 0.5 * dense


def test_a_reading_of_a_busy_machine_does_not_count(monkeypatch) -> None:
    model, x, table = wide(), images(), Steps(lane=2)
    engine = Simulated(monkeypatch, table)
    watch = Stopwatch(engine, model, x, repeats=5)
    small = engine.prepare(lp.prune(model, x, ratio=0.5).model.eval(), x)
    takes = watch.time(small)
    start, own = engine.passes, engine.milliseconds(model, x)
    assert watch.dense == pytest.approx(own)
    # For a while each pass takes longer, a short one relatively more.
    engine.mood = lambda passes: 1.0 + (passes - start < 600) * (1.5 if passes % 4 in (0, 1) else 0.5)
    assert watch.time(small) == pytest.approx(takes)
    assert engine.passes - start > 600


def test_it_keeps_more_score_in_the_same_time_than_the_weakest_of_the_network_do(monkeypatch) -> None:
    model, x, table = build("Residual"), images(), Steps(lane=2)
    engine = Simulated(monkeypatch, table)
    graph = lp.trace(model, x)
    scores, dense = RandomScores(graph, 1), engine.milliseconds(model, x)

    def kept(selection: Budget) -> float:
        plan = selection.select(graph, scores, model=model, example_inputs=x)
        return sum(float(scores[name][list(group.keep)].sum()) for name, group in plan.groups.items())

    milliseconds = 0.5 * dense
    by_table = kept(Budget(latency_ms=milliseconds, engine=engine, table=table))
    assert by_table > 1.02 * kept(Budget(latency_ms=milliseconds, engine=engine))


def test_the_best_of_every_group_are_kept_and_it_is_told_how_good_that_is(monkeypatch) -> None:
    model, x, table = wide(), images(), Steps(lane=4)
    engine = Simulated(monkeypatch, table)
    graph = lp.trace(model, x)
    scores = RandomScores(graph, 5)
    asked = Budget(latency_ms=0.5 * engine.milliseconds(model, x), engine=engine, table=table)
    plan = asked.select(graph, scores, model=model, example_inputs=x)
    for name, group in plan.groups.items():
        assert set(group.keep) == set(scores[name].argsort(descending=True)[: len(group.keep)].tolist())
    choice = asked.by_table(graph, scores, model=model, example_inputs=x)
    assert choice.kept == {name: len(group.keep) for name, group in plan.groups.items()}
    value = sum(float(scores[name][list(group.keep)].sum()) for name, group in plan.groups.items())
    assert choice.value == pytest.approx(value)
    assert choice.value <= choice.bound <= 1.05 * choice.value
    pattern = r"the most score kept within [\d.]+ ms by the table: [\d.]+ of at most [\d.]+ \(gap [\d.]+ %\), measured"
    assert re.match(pattern, str(choice))


def test_each_group_ends_where_its_own_layers_step(monkeypatch) -> None:
    model, x = wide(), images()
    engine = Simulated(monkeypatch, Steps(lane=8))
    table = Steps(lane=8)
    plan, _ = chosen(model, x, Budget(latency_ms=0.5 * engine.milliseconds(model, x), engine=engine, table=table))
    kept = [len(group.keep) for group in plan.groups.values()]
    assert all(width % 8 == 0 for width in kept)
    assert len({*kept}) > 1
    plan, _ = chosen(  # what the user asks for holds besides
        model, x, Budget(latency_ms=0.5 * engine.milliseconds(model, x), engine=engine, table=table, round_to=12)
    )
    assert all(len(group.keep) % 12 == 0 or len(group.keep) == 64 for group in plan.groups.values())


def test_a_width_that_takes_longer_than_a_larger_one_is_rounded_up(monkeypatch) -> None:
    model, x = wide(), images()
    table = Steps(lane=1, slow=lambda out: 1.0 + 0.5 * (out % 16 != 0) * (out > 4))
    engine = Simulated(monkeypatch, table)
    for share in (0.9, 0.6, 0.3):
        milliseconds = share * engine.milliseconds(model, x)
        plan, small = chosen(model, x, Budget(latency_ms=milliseconds, engine=engine, table=table))
        kept = [len(group.keep) for group in plan.groups.values()]
        assert sum(width % 16 == 0 for width in kept) >= len(kept) - 1, kept  # one may fill up what is left
        assert engine.milliseconds(small, x) <= milliseconds


def test_a_model_slower_than_its_parent_is_never_returned(monkeypatch) -> None:
    model, x, table = wide(), images(), Steps()
    really = Steps(slow=lambda out: 1.0 + (out % 64 > 4) * 1e4)  # unlike what the table says, pruning does not pay
    engine = Simulated(monkeypatch, really)
    dense = engine.milliseconds(model, x)
    for milliseconds in (1.001 * dense, 1.5 * dense):
        with pytest.warns(NoEffectWarning, match="removes no channel"):
            plan, _ = chosen(model, x, Budget(latency_ms=milliseconds, engine=engine, table=table))
        assert {name: len(group.keep) for name, group in plan.groups.items()} == dict.fromkeys(("0", "2", "5", "7"), 64)
    with pytest.raises(PlanError, match="cannot be met"):
        chosen(model, x, Budget(latency_ms=0.95 * dense, engine=engine, table=table, min_channels=5))


def test_an_impossible_latency_is_refused_and_the_nearest_named(monkeypatch) -> None:
    model, x, table = wide(), images(), Steps()
    engine = Simulated(monkeypatch, table, offset=4.0)
    asked = Budget(latency_ms=3.0, engine=engine, table=table, min_channels=8)
    with pytest.raises(PlanError, match=r"latency_ms: dense .* CANNOT be met.*The nearest that can be met is") as error:
        chosen(model, x, asked)
    nearest = float(re.search(r"Budget\(latency_ms=([\d.]+)\)", str(error.value)).group(1))
    least = wide(8)
    least[9] = nn.Conv2d(8, 4, 1).double()
    assert nearest == pytest.approx(1.05 * engine.milliseconds(least, x), rel=1e-3)
    _, small = chosen(model, x, Budget(latency_ms=nearest, engine=engine, table=table, min_channels=8))
    assert engine.milliseconds(small, x) <= nearest


def test_where_widths_are_coarse_the_budget_is_filled_as_far_as_they_fit(monkeypatch) -> None:
    model, x, table = wide(), images(), Steps()
    engine = Simulated(monkeypatch, table)
    some = 0.7 * engine.milliseconds(model, x)
    _, small = chosen(model, x, Budget(latency_ms=some, engine=engine, table=table, round_to=32))
    reached = engine.milliseconds(small, x)
    for milliseconds in (1.001 * reached, 1.02 * reached):
        _, again = chosen(model, x, Budget(latency_ms=milliseconds, engine=engine, table=table, round_to=32))
        assert engine.milliseconds(again, x) == reached


def test_where_the_table_calls_alike_what_is_not_half_of_the_groups_grow(monkeypatch) -> None:
    """Wider than 47 channels a layer takes three times as long, which the table does not know."""
    model, x, table = wide(), images(), Steps(lane=16)
    engine = Simulated(monkeypatch, Steps(lane=2, slow=lambda out: np.where(out > 47, 3.0, 1.0)))
    budget = Budget(latency_ms=0.25 * engine.milliseconds(model, x), engine=engine, table=table)
    graph = lp.trace(model, x)
    about = {"model": model, "example_inputs": x}
    found = budget.by_table(graph, RandomScores(graph, 5), **about)
    assert found.models <= MODELS
    small = lp.reconstruct(model, graph, found.plan, example_inputs=x)
    assert engine.milliseconds(small, x) <= budget.latency_ms
    assert found.value == pytest.approx(
        sum(float(RandomScores(graph, 5)[name][list(of.keep)].sum()) for name, of in found.plan.groups.items())
    )
    monkeypatch.setattr(TableSearch, "_half_way", lambda self: None)
    assert budget.by_table(graph, RandomScores(graph, 5), **about).value < found.value


def test_negative_scores_count_too(monkeypatch) -> None:
    model, x, table = wide(), images(), Steps(lane=2)
    engine = Simulated(monkeypatch, table)
    graph = lp.trace(model, x)
    scores = RandomScores(graph, 5)
    asked = Budget(latency_ms=0.5 * engine.milliseconds(model, x), engine=engine, table=table)
    lower = {name: values - 0.5 for name, values in scores.items()}
    lowest = min(float(values.min()) for values in lower.values())
    raised = {name: values - lowest for name, values in lower.items()}
    options = {"model": model, "example_inputs": x}
    assert asked.select(graph, lower, **options) == asked.select(graph, raised, **options)


def test_ignored_layers_and_min_channels_stay(monkeypatch) -> None:
    model, x, table = wide(), images(), Steps(lane=2)
    engine = Simulated(monkeypatch, table)
    half = 0.5 * engine.milliseconds(model, x)
    plan, _ = chosen(model, x, Budget(latency_ms=half, engine=engine, table=table, ignore="2", min_channels=30))
    assert set(plan.groups) == {"0", "5", "7"}
    assert all(len(group.keep) >= 30 for group in plan.groups.values())


def test_a_group_that_the_code_needs_whole_pays_with_others(monkeypatch) -> None:
    class Picky(nn.Module):
        """Does not run with fewer than three channels, which tracing does not try."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 64, 1), nn.Conv2d(64, 2, 1)

        def forward(self, x):
            x = self.a(x)
            if x.shape[1] < 3:
                raise ValueError("three channels at least")
            return self.c(self.b(x))

    model, x, table = Picky().double().eval(), images(), Steps(lane=1)
    engine = Simulated(monkeypatch, table)
    graph = lp.trace(model, x)
    scores = {"a": torch.zeros(6), "b": torch.arange(1.0, 65.0)}
    asked = Budget(latency_ms=0.5 * engine.milliseconds(model, x), engine=engine, table=table)
    plan = asked.select(graph, scores, model=model, example_inputs=x)
    with pytest.warns(NotReconstructedWarning, match="group 'a' keeps its 6 channels"):
        small = lp.reconstruct(model, graph, plan, example_inputs=x)
    assert 0.93 * asked.latency_ms <= engine.milliseconds(small, x) <= asked.latency_ms


# Refused


def test_what_a_table_cannot_do_is_refused(monkeypatch) -> None:
    model, x, table = wide(8), images(), Steps()
    engine = Simulated(monkeypatch, table)
    with pytest.raises(PlanError, match="serves budgets of latency_ms= alone"):
        Budget(flops=0.5, table=table)
    with pytest.raises(PlanError, match="serves budgets of latency_ms= alone"):
        Budget(latency_ms=3, flops=0.5, table=table)
    with pytest.raises(PlanError, match="table must be a LatencyTable or its file, got 3"):
        Budget(latency_ms=3, table=3)
    with pytest.raises(lp.errors.EngineError, match="engine must be one of"):
        Budget(latency_ms=3, engine="abacus")
    for coupling in ("union", "intersection"):
        with pytest.raises(PlanError, match=f"under coupling='{coupling}' layers choose by themselves"):
            chosen(model, x, Budget(latency_ms=0.1, engine=engine, table=table), coupling=coupling)
    with pytest.raises(PlanError, match="of the engine 'simulated', not 'eager'"):
        chosen(model, x, Budget(latency_ms=0.1, table=table))
    graph = lp.trace(model, x)
    with pytest.raises(PlanError, match="measures the pruned model: pass select"):
        Budget(latency_ms=0.1, engine=engine, table=table).select(graph, RandomScores(graph))
    with pytest.raises(PlanError, match="depends on the machine"):
        Budget(latency_ms=0.1, engine=engine, table=table).part(0.5)


def test_layers_that_the_table_lacks_are_named(monkeypatch) -> None:
    class Lacking(Steps):
        def time(self, kind, channels_in, channels_out):
            if kind.activation is None:
                raise PlanError("unknown")
            return super().time(kind, channels_in, channels_out)

    model, x = wide(8), images()
    engine = Simulated(monkeypatch, Steps())
    with pytest.raises(PlanError, match=r"no times of 9.weight, as this model runs .* lightning-prune latency-table"):
        chosen(model, x, Budget(latency_ms=0.1, engine=engine, table=Lacking()))


def test_a_table_of_another_machine_is_believed_without_measuring(monkeypatch) -> None:
    model, x, table = wide(), images(), Steps(lane=2)
    engine = Simulated(monkeypatch, table)
    dense = engine.milliseconds(model, x)
    there = Steps(lane=2)
    vars(there).update(elsewhere=True, whole_ms=10 * dense, machine={"cpu": "Cortex-A72", "gpu": None})
    graph = lp.trace(model, x)
    about = {"model": model, "example_inputs": x}
    scores = RandomScores(graph, 5)
    found = Budget(latency_ms=5 * dense, engine=engine, table=there).by_table(graph, scores, **about)
    assert engine.prepared == 0
    small = lp.reconstruct(model, graph, found.plan, example_inputs=x)
    assert 0.45 * dense < engine.milliseconds(small, x) <= 0.5 * dense  # ten times as long there
    assert found.measured_ms == pytest.approx(10 * engine.milliseconds(small, x))
    assert f"expected {found.measured_ms:,.2f} ms" in str(found)
    assert "on Cortex-A72: measure it there" in str(found)
    reach = Budget(latency_ms=1e-3 * dense, engine=engine, table=there).reach(graph, scores, **about)
    assert not reach.met
    with pytest.raises(PlanError, match=rf"latency_ms={reach.nearest['latency_ms']:.6g}"):
        Budget(latency_ms=1e-3 * dense, engine=engine, table=there).by_table(graph, scores, **about)
    whole = Budget(latency_ms=11 * dense, engine=engine, table=there).by_table(graph, scores, **about)
    assert "all channels stay" in str(whole)


def test_a_table_of_another_machine_has_to_know_the_whole_model_and_the_engine(monkeypatch) -> None:
    model, x, there = wide(), images(), Steps(lane=2)
    engine = Simulated(monkeypatch, there)
    vars(there).update(elsewhere=True)
    graph = lp.trace(model, x)
    budget = Budget(latency_ms=1.0, engine=engine, table=there)
    with pytest.raises(PlanError, match="its whole model takes None ms"):
        budget.select(graph, RandomScores(graph, 5), model=model, example_inputs=x)
    vars(there).update(whole_ms=2.0)
    with pytest.raises(PlanError, match=r"is of the engine 'simulated'.*engine='eager' needs one"):
        Budget(latency_ms=1.0, table=there).select(graph, RandomScores(graph, 5), model=model, example_inputs=x)


def test_widths_that_the_engine_does_not_like_are_left_out(monkeypatch) -> None:
    class Likes(Steps):
        def alignment(self, kind):
            return 4, 1

    model, x, table = wide(), images(), Likes(lane=1)
    engine = Simulated(monkeypatch, table)
    plan, _ = chosen(model, x, Budget(latency_ms=0.6 * engine.milliseconds(model, x), engine=engine, table=table))
    kept = {name: (len(group.keep), group.size) for name, group in plan.groups.items()}
    assert all(width % 4 == 0 or width == size for width, size in kept.values())
    assert any(width < size for width, size in kept.values())
