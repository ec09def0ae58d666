"""Layers that a setting means, given as modules, as names of containers, and as what makes no sense."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_prune as lp
from lightning_prune.errors import PlanError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)))
        self.body2 = nn.Conv2d(8, 8, 1)
        self.again = nn.ModuleList([self.body2, nn.ReLU()])
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.head(self.again[1](self.again[0](self.body(self.stem(x)).relu())))


IMAGES = torch.randn(2, 3, 8, 8)
LAYERS = {"stem", "body.0", "body.2.0", "body2"}
GIVEN = {
    "layer": (lambda m: m.stem, {"stem"}),
    "list": (lambda m: [m.stem, "body.0"], {"stem", "body.0"}),
    "set": (lambda m: {m.stem, m.body2}, {"stem", "body2"}),
    "container": (lambda m: (m.body,), {"body.0", "body.2.0"}),
    "container by name": (lambda m: "body", {"body.0", "body.2.0"}),
    "shared": (lambda m: [m.again], {"body2"}),
}


@pytest.mark.parametrize("kind", GIVEN)
@pytest.mark.parametrize("selection", [lp.GlobalRatio, lp.LayerRatio, lambda _, **of: lp.Budget(params=0.95, **of)])
def test_modules_and_containers_are_left_alone(kind, selection):
    model = Net()
    give, kept = GIVEN[kind]
    plan = lp.prune(model, IMAGES, selection=selection(0.8, ignore=give(model))).plan
    assert set(plan.groups) == LAYERS - kept
    session = lp.PruningSession(model, IMAGES, selection=selection(0.8, ignore=give(model)))
    session.step()
    assert session.plan == plan
    assert all(isinstance(name, str) for name in session.selection.ignore)  # as checkpoints and messages want it


def test_overrides_by_module_hold_for_what_is_inside():
    model = Net()
    by_module = lp.LayerRatio(0.5, overrides={model.body: 0.25, "body2": 0.0})
    plan = lp.prune(model, IMAGES, selection=by_module).plan
    assert {name: len(group.keep) for name, group in plan.groups.items()} == {
        "stem": 4,
        "body.0": 6,
        "body.2.0": 6,
        "body2": 8,
    }


def test_without_a_session_select_wants_the_model():
    model = Net()
    graph = lp.trace(model, IMAGES)
    scores, selection = lp.score(model, graph, "l1"), lp.GlobalRatio(0.5, ignore=[model.body])
    plan = selection.select(graph, scores, model=model)
    assert set(plan.groups) == {"stem", "body2"}
    with pytest.raises(PlanError, match=r"ignore: a module \(Sequential\) .* model=model"):
        selection.select(graph, scores)
    with pytest.raises(PlanError, match=r"ignore: a module"):
        selection.total(graph)
    budget = lp.Budget(params=0.5, ignore=[model.body])
    assert budget.reach(graph, scores, model=model, example_inputs=IMAGES).met


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda _: lp.GlobalRatio(0.5, ignore=[Net().stem]), "ignore: this Conv2d is not in the model"),
        (lambda m: lp.GlobalRatio(0.5, ignore=m.body[1]), r"ignore: no layer matches 'body.1'; layers are stem, "),
        (lambda _: lp.GlobalRatio(0.5, ignore=[3]), r"ignore takes the name of a layer .* got 3"),
        (lambda m: lp.GlobalRatio(0.5, ignore=m.stem.weight), r"ignore takes the name of a layer"),
        (lambda m: lp.GlobalRatio(0.5, ignore=m), "nothing to prune in this model: stem is ignored"),
        (lambda _: lp.LayerRatio(0.5, overrides={3: 0.5}), r"overrides takes the name of a layer .* got 3"),
        (lambda _: lp.LayerRatio(0.5, overrides=[0.5]), r"overrides takes ratios by layer, .* got \[0.5\]"),
        (lambda _: lp.LayerRatio({"stem": 0.5}), r"ratios of single layers go to overrides: LayerRatio\(0.5, over"),
        (lambda _: lp.GlobalRatio(0.5, ignore="bod"), "no layer matches 'bod'"),
    ],
)
def test_what_means_no_layer_is_refused(make, message):
    model = Net()
    with pytest.raises(PlanError, match=message):
        lp.prune(model, IMAGES, selection=make(model))
