"""A plan explained: numbers are those of reconstruction, every group is accounted for, nothing is changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_prune as lp
from lightning_prune.errors import PlanError
from tests.criteria.helpers import assert_same, snapshot
from tests.helpers import RandomScores, random_plan
from tests.zoo import ZOO, build, images


@pytest.mark.parametrize("coupling", ["joint", "union"])
@pytest.mark.parametrize("name", ZOO)
def test_the_numbers_are_those_of_reconstruction(name: str, coupling) -> None:
    model, x = build(name).train(), images()
    graph = lp.trace(model, x)
    plan = random_plan(graph, 0.5, coupling)
    before = snapshot(model)
    told = lp.explain(model, graph, plan, x)
    assert_same(before, snapshot(model))
    small = lp.reconstruct(model, graph, plan)
    assert told.params == (lp.measure.count_params(model), lp.measure.count_params(small))
    assert told.macs == (lp.measure.count_flops(model, x), lp.measure.count_flops(small, x))
    assert [group.name for group in told.groups] == [group.name for group in graph.groups]
    for group in told.groups:
        if group.name not in plan.groups:
            assert (group.kept, group.params_saved, group.macs_saved) == (group.channels, 0, 0)
            continue
        assert (group.kept, group.channels) == (len(plan.groups[group.name].keep), plan.groups[group.name].size)
        others = lp.Plan({n: g for n, g in plan.groups.items() if n != group.name}, coupling)
        without = lp.reconstruct(model, graph, others)
        assert group.params_saved == lp.measure.count_params(without) - lp.measure.count_params(small)
        assert group.macs_saved == lp.measure.count_flops(without, x) - lp.measure.count_flops(small, x)


def test_the_table_of_a_residual_network() -> None:
    model, x = build("Residual"), images()
    graph = lp.trace(model, x)
    plan = lp.LayerRatio(0.5, ignore="a1.0").select(graph, RandomScores(graph))
    expected = """\
group    channels  kept  params saved  MACs saved
-------  --------  ----  ------------  ----------
stem.0          8     4           940      47,616
a1.0            8     8             0           0
b1.0           12     6           552       8,640
b2.0           12     6           402       5,598
head.fc         5     5             0           0
saved: what comes back if that group alone is left whole; they do not add up

stem.0: together with a2.0
a1.0: not in the plan: ignored, or no candidate
b2.0: together with down.0
head.fc: not prunable: reaches the model's output

channels: 29 of 45 remain (64 %)
params: 1,351 of 3,809 remain (35 %)
MACs: 52,830 of 123,708 remain (43 %)
lossless: yes, by construction"""
    assert str(lp.explain(model, graph, plan, x)) == expected


def test_zero_filters_that_fill_an_addition_are_told() -> None:
    model, x = build("Residual"), images()
    graph = lp.trace(model, x)
    plan = random_plan(graph, 0.5, "union")
    told = {group.name: group for group in lp.explain(model, graph, plan, x).groups}
    group = plan.groups["b2.0"]
    zero = sum(len(group.keep) - len(own) for own in group.layers.values())
    assert told["b2.0"].note == f"{zero} zero filters stay for an addition; together with down.0"
    assert told["b1.0"].note == ""


def test_loss_is_never_passed_over() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.norm(self.a(x)))

    model, x = Normed(), torch.randn(2, 4)
    graph = lp.trace(model, x, statistics=True)
    told = lp.explain(model, graph, random_plan(graph), x)
    assert told.groups[0].note.startswith("with loss: ")
    assert str(told).endswith("lossless: NO, by choice of the plan")
    graph = lp.trace(model, x)
    told = lp.explain(model, graph, lp.Plan({}), x)
    assert told.lossless
    assert told.groups[0].note.startswith("not prunable: ")
    model, x = build("Residual"), images()
    graph = lp.trace(model, x)
    assert not lp.explain(model, graph, random_plan(graph, coupling="intersection"), x).lossless


def test_a_group_that_keeps_everything_says_so() -> None:
    model, x = build("Residual"), images()
    graph = lp.trace(model, x)
    plan = lp.LayerRatio(0.0, overrides={"a1.0": 0.5}).select(graph, RandomScores(graph))
    notes = {group.name: group.note for group in lp.explain(model, graph, plan, x).groups}
    assert notes["b1.0"] == "keeps all its channels"
    assert notes["a1.0"] == ""


def test_whether_a_budget_can_be_met_is_told_along() -> None:
    model, x = build("Residual"), images()
    graph = lp.trace(model, x)
    scores = RandomScores(graph)
    reach = lp.Budget(flops=0.01).reach(graph, scores, model=model, example_inputs=x)
    told = str(lp.explain(model, graph, random_plan(graph), x, reach=reach))
    assert told.splitlines()[-1].startswith("flops: dense ")
    assert told.endswith("remain: CANNOT be met")


def test_a_plan_of_another_model_is_refused() -> None:
    model, x = build("Residual"), images()
    graph = lp.trace(model, x)
    with pytest.raises(PlanError, match="has no channel group 'conv'"):
        lp.explain(model, graph, lp.Plan({"conv": lp.plan.GroupPlan(4, (0,))}), x)
    with pytest.raises(PlanError, match="traced on another model"):
        lp.explain(build("Vgg"), graph, random_plan(graph), x)
