"""Changing a plan by layer: what stays, what goes with it, which constraints hold, what is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import lightning_prune as lp
from lightning_prune.errors import PlanError
from lightning_prune.graph import ChannelGraph, trace
from lightning_prune.measure import CostModel, count_flops, count_params
from lightning_prune.plan import GroupPlan, Plan
from lightning_prune.reconstruction import reconstruct
from lightning_prune.selection import LayerRatio
from tests.helpers import RandomScores, random_plan
from tests.zoo import ZOO, build, images

RISING = torch.arange(16.0)


@pytest.fixture
def line() -> tuple[nn.Module, ChannelGraph]:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 1))
    return model, trace(model, torch.zeros(1, 3, 8, 8))


def test_named_channels_stay_or_go_and_no_others_change(line) -> None:
    plan = LayerRatio(0.5).select(line[1], {"0": RISING})
    assert plan.keep("0", [0, 3, 8]).groups["0"].keep == (0, 3, *range(8, 16))
    assert plan.remove("0", [15, 0]).groups["0"].keep == tuple(range(8, 15))
    assert plan.whole("0").groups["0"].keep == tuple(range(16))
    assert plan.groups["0"].keep == tuple(range(8, 16))  # as it was
    assert plan.keep("0", torch.tensor([2])).groups["0"].keep[0] == 2
    assert plan.keep("0", 2) == plan.keep("0", range(2, 3))
    assert plan.keep("0", []) == plan == plan.keep("3", [0, 1])


@pytest.mark.parametrize("coupling", ["joint", "union", "intersection"])
@pytest.mark.parametrize("name", ZOO)
def test_a_changed_plan_can_be_carried_out(name: str, coupling) -> None:
    model, x = build(name), images()
    graph = trace(model, x)
    plan = random_plan(graph, 0.25, coupling=coupling)  # more, and intersections would be empty
    for group in graph.prunable_groups:
        layer = group.layers[-1]
        kept, gone = int(layer.index[0, -1]), int(layer.index[-1, 0])
        changed = plan.keep(layer.name, [kept]).remove(layer.name, [gone])
        own = changed.groups[group.name].layers[layer.name]
        assert 0 in own
        assert group.size - 1 not in own
        if coupling == "joint":
            assert all(of == own for of in changed.groups[group.name].layers.values())
        changed.check(graph)
        if group is graph.prunable_groups[0] and coupling != "intersection":
            reconstruct(model, graph, changed, example_inputs=x)


def test_equal_shares_of_a_grouped_convolution_go_together() -> None:
    graph = trace(build("Grouped"), images())
    plan = random_plan(graph).whole("a.0")
    rows = graph.group("a.0").layers[0].index.tolist()  # (4, 3) filters
    for filters in rows[1]:
        assert plan.remove("a.0", [filters]).groups["a.0"].keep == (0, 2, 3)


def test_a_layer_of_several_groups_is_named_by_its_own_filters() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 10, 1), nn.Conv2d(4, 2, 1), nn.Conv2d(6, 2, 1)

        def forward(self, x):
            left, right = self.a(x).relu().split([4, 6], dim=1)
            return self.b(left) + self.c(right)

    graph = trace(Split(), torch.zeros(1, 3, 4, 4))
    names = [group.name for group in graph.prunable_groups]
    assert names == ["a[0:4]", "a[4:10]"]
    plan = random_plan(graph).whole("a")
    changed = plan.remove("a", [1, 5, 9])
    assert [changed.groups[name].removed for name in names] == [(1,), (1, 5)]
    assert plan.remove("a[4:10]", [0]).groups["a[4:10]"].removed == (0,)


def test_under_union_a_layer_chooses_for_itself() -> None:
    graph = trace(build("Residual"), images())
    plan = random_plan(graph, coupling="union").whole("b*").whole("down")
    less = plan.remove("b2.0", [0, 1])
    assert less.groups["b2.0"].layers["b2.0"] == tuple(range(2, 12))
    assert less.groups["b2.0"].keep == tuple(range(12))  # the other layer keeps them
    assert less.remove("down.0", [0]).groups["b2.0"].keep == tuple(range(1, 12))


def test_whole_takes_modules_and_patterns() -> None:
    graph = trace(build("Residual"), images())
    plan = random_plan(graph)
    assert not plan.whole("*")
    assert not plan.whole("b1").groups["b1.0"].removed
    assert not plan.whole("[ab]1.*").groups["a1.0"].removed
    assert plan.whole("b1").groups["b2.0"].removed


def test_a_group_that_the_selection_ignored_can_be_named() -> None:
    graph = trace(build("Residual"), images())
    plan = LayerRatio(0.5, ignore="b1").select(graph, RandomScores(graph))
    assert "b1.0" not in plan.groups
    assert plan.remove("b1.0", [2]).groups["b1.0"].removed == (2,)
    assert "b1.0" not in plan.whole("b1.0").groups


# Constraints


def test_multiples_stay_multiples_and_the_best_come_back(line) -> None:
    plan = LayerRatio(0.5, round_to=4).select(line[1], {"0": RISING})
    assert plan.groups["0"].keep == tuple(range(8, 16))
    assert plan.keep("0", [0]).groups["0"].keep == (0, *range(5, 16))  # 5 to 7 are the best of the others
    assert plan.remove("0", [15]).groups["0"].keep == tuple(range(7, 15))
    assert plan.remove("0", range(12, 16)).groups["0"].keep == tuple(range(8, 12))
    swapped = plan.remove("0", [7, 15]).remove("0", [14])  # what was named does not come back
    assert swapped.groups["0"].keep == (5, 6, *range(8, 14))
    assert swapped.keep("0", [7]).groups["0"].keep == tuple(range(2, 14))


def test_a_multiple_that_cannot_be_had_is_refused(line) -> None:
    whole = LayerRatio(0.5, round_to=4).select(line[1], {"0": RISING}).whole("0")
    with pytest.raises(PlanError, match=r"would keep 15 of 16 channels, no multiple of 4 .* remove 3 more"):
        whole.remove("0", [3])
    told = Plan({}).on(line[1], round_to=8)
    with pytest.raises(PlanError, match=r"would keep 5 of 16 channels, no multiple of 8 .* keep 3 more"):
        told.remove("0", range(11))
    assert told.remove("0", range(8)).groups["0"].keep == tuple(range(8, 16))


@pytest.mark.parametrize(("least", "message"), [(4, "at least 4"), (0.5, "at least 8"), (1, "at least 1")])
def test_fewer_than_have_to_stay_are_refused(line, least, message: str) -> None:
    plan = LayerRatio(0.25, min_channels=least).select(line[1], {"0": RISING})
    with pytest.raises(PlanError, match=rf"would keep 0 of 16 channels, and {message} have to stay \(min_channels\)"):
        plan.remove("0", range(16))


# Refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.keep("1.0", [0]), r"has no layer '1\.0'; did you mean '0'|its layers are 0, 3"),
        (lambda p: p.whole("conv"), r"the model has no layer 'conv'; its layers are 0, 3"),
        (lambda p: p.remove("1", [0]), r"'1' is a batch norm: its channels are those of layer '0'"),
        (lambda p: p.remove("3", [0]), r"group '3' cannot be pruned: it reaches the model's output"),
        (lambda p: p.remove("0", [16]), r"'0' has channels 0 to 15, got 16"),
        (lambda p: p.keep("0", [-1]), r"'0' has channels 0 to 15, got -1"),
        (lambda p: p.keep("0", [True] * 16), r"channels are named by their numbers"),
        (lambda p: p.keep("0", torch.ones(16, dtype=torch.bool)), r"channels are named by their numbers"),
        (lambda p: p.keep("0", [0.5]), r"channels are named by their numbers, such as \[0, 3\], got \[0\.5\]"),
    ],
    ids=["no-layer", "no-whole", "norm", "output", "beyond", "negative", "mask", "mask-tensor", "half"],
)
def test_what_makes_no_sense_is_refused(line, change, message: str) -> None:
    plan = LayerRatio(0.5).select(line[1], {"0": RISING})
    with pytest.raises(PlanError, match=message):
        change(plan)


def test_near_matches_are_named() -> None:
    graph = trace(build("Residual"), images())
    with pytest.raises(PlanError, match=r"no layer 'stem'; did you mean 'stem\.0'"):
        random_plan(graph).keep("stem", [0])


def test_a_plan_from_elsewhere_has_to_be_told_its_graph(line, tmp_path) -> None:
    plan = LayerRatio(0.5).select(line[1], {"0": RISING})
    plan.save(tmp_path / "plan.json")
    for other in (Plan.load(tmp_path / "plan.json"), pickle.loads(pickle.dumps(plan)), copy.deepcopy(plan)):
        with pytest.raises(PlanError, match=r"call plan\.on\(graph\) first"):
            other.keep("0", [0])
        assert other.on(line[1]).keep("0", [0]) == plan.keep("0", [0])
    with pytest.raises(PlanError, match="has 16 channels, the plan is for 8"):
        Plan({"0": GroupPlan(8, (0,))}).on(line[1])


# Costs, and where plans are taken


def test_costs_follow_at_once_and_are_those_of_the_smaller_model(line) -> None:
    model, graph = line
    x = torch.zeros(1, 3, 8, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    session = lp.PruningSession(model, x, selection=LayerRatio(0.5))
    session.score()
    plan = session.select().keep("0", [0]).remove("0", [3])
    small = reconstruct(model, graph, plan)
    expected = count_params(small), count_flops(small, x)
    assert session.cost(plan) == expected == CostModel(model, graph, x).of(plan)
    assert session.cost() == (count_params(model), count_flops(model, x))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_session_carries_out_a_changed_plan_step_by_step() -> None:
    model, x = build("Residual"), images()
    session = lp.PruningSession(model, x, ratio=0.5, schedule=lp.schedule.Gradual(rounds=2, epochs=1))
    session.score()
    first = session.select().whole("b1.0").remove("a1.0", [0])
    session.mask_(first)
    assert session.plan == first
    assert session.channels.layers["a1.0"].outputs.removed == first.groups["a1.0"].removed
    session.reconstruct_()
    session.score()
    second = session.select()
    assert 0 in second.groups["a1.0"].removed  # it is gone
    assert session.cost(first) == (count_params(model), count_flops(model, x))
    assert session.cost(second)[0] < count_params(model)
    with pytest.raises(PlanError, match="an earlier plan removed them"):
        session.mask_(second.keep("a1.0", [0]))
    second = second.whole("b1.0")
    session.mask_(second)
    assert session.reconstruct_().passed
    assert session.channels == lp.reconstruction.ChannelMap.of(model)
    assert {name: session.channels.layers[name].outputs.removed for name in ("a1.0", "b1.0")} == {
        "a1.0": second.groups["a1.0"].removed,
        "b1.0": (),
    }


@pytest.mark.parametrize("coupling", ["joint", "union"])
def test_prune_carries_out_a_plan(coupling, tmp_path) -> None:
    model, x = build("Residual"), images()
    plan = random_plan(trace(model, x), coupling=coupling).keep("b1.0", [0, 1]).remove("a1.0", [0, 1])
    result = lp.prune(model, x, selection=plan, coupling=coupling)
    assert result.plan == plan
    assert result.lossless.passed
    assert result.channels.layers["a1.0"].outputs.keep == plan.groups["a1.0"].keep
    plan.save(tmp_path / "plan.json")
    from_file = lp.selection.FixedPlan(plan=tmp_path / "plan.json")
    assert lp.prune(model, x, selection=from_file, coupling=coupling).plan == plan
    assert "groups" in repr(from_file)
    assert len(repr(from_file)) < 80
    with pytest.raises(PlanError, match=rf"the plan was made with coupling='{coupling}', and it is asked for with"):
        lp.prune(model, x, selection=plan, coupling="union" if coupling == "joint" else "joint")


def test_a_fixed_plan_refuses_what_it_cannot_mean(line) -> None:
    with pytest.raises(PlanError, match="constraints do not apply"):
        lp.selection.FixedPlan(plan=Plan({}), round_to=8)
    with pytest.raises(PlanError, match="must be a Plan, or the file of one, got 3"):
        lp.selection.FixedPlan(plan=3)
    with pytest.raises(PlanError, match="the model has no channel group 'a'"):
        lp.prune(line[0], torch.zeros(1, 3, 8, 8), selection=Plan({"a": GroupPlan(2, (0,))}))
    with pytest.raises(PlanError, match="cannot be spread over several steps"):
        lp.selection.FixedPlan(plan=Plan({})).part(0.5)
