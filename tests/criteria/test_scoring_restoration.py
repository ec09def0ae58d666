"""The model is left as it was found, and what cannot be scored is refused before anything changes."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_prune.criteria import GRE, JRE, L1, LRE
from lightning_prune.criteria.scorer import Scorer
from lightning_prune.criteria.scoring import score
from lightning_prune.errors import PlanError, ScoreError
from lightning_prune.graph import ChannelGraph, Group, Layer, trace
from lightning_prune.plan import GroupPlan, Plan
from lightning_prune.reconstruction.masks import mask_
from tests.criteria.helpers import Interrupt, assert_same, hooks, snapshot
from tests.graph.helpers import CASES, Case, conv_case, graph_of, identity, residual_case


@pytest.mark.parametrize("bn_mode", ["eval", "train", "keep"])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", ["conv", "residual"])
def test_everything_is_put_back(name, fails, bn_mode):
    case = CASES[name]()
    case.model.train()
    case.model.bn2.eval()
    case.model.fc.requires_grad_(False)
    case.model.conv1.weight.grad = torch.ones_like(case.model.conv1.weight)
    before = snapshot(case.model)
    inner = case.loss

    def loss(model, batch):
        torch.rand(3), np.random.rand(), random.random()
        model.bn1.training = not model.bn1.training
        model.fc.weight.requires_grad_(True)
        result = inner(model, batch)
        if fails:
            raise Interrupt
        return result

    if fails:
        with pytest.raises(Interrupt):
            score(case.model, case.graph, JRE(), [case.batch], loss, bn_mode=bn_mode)
    else:
        score(case.model, case.graph, JRE(), [case.batch], loss, bn_mode=bn_mode)
    assert_same(before, snapshot(case.model))


def test_gradients_that_the_step_accumulates_do_not_reach_the_user():
    case = conv_case()
    case.model.conv1.weight.grad = torch.ones_like(case.model.conv1.weight)
    before = snapshot(case.model)

    def loss(model, batch):
        model.conv1.weight.sum().backward()
        return case.loss(model, batch)

    score(case.model, case.graph, GRE(), [case.batch], loss)
    assert_same(before, snapshot(case.model))


@pytest.mark.parametrize("fails", [False, True])
def test_baseline_weights_are_taken_out_again(fails):
    case = conv_case()
    dense = {name: torch.randn_like(t) if t.is_floating_point() else t for name, t in case.model.state_dict().items()}
    kept = {name: tensor.clone() for name, tensor in dense.items()}
    before = snapshot(case.model)

    def loss(model, batch):
        assert torch.equal(model.conv1.weight, dense["conv1.weight"])
        if fails:
            raise Interrupt
        return case.loss(model, batch)

    criterion = LRE(reference="baseline")
    if fails:
        with pytest.raises(Interrupt):
            score(case.model, case.graph, criterion, [case.batch], loss, baseline=dense)
    else:
        score(case.model, case.graph, criterion, [case.batch], loss, baseline=dense, bn_mode="train")
    assert_same(before, snapshot(case.model))
    assert all(torch.equal(dense[name], kept[name]) for name in dense)


def test_masks_do_not_act_on_the_baseline():
    case = conv_case()
    case.graph = trace(case.model, case.images)
    dense = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    criterion = LRE(reference="baseline")
    expected = score(case.model, case.graph, criterion, [case.batch], case.loss, baseline=dense)
    group = case.graph.groups[0]
    plan = Plan({group.name: GroupPlan(group.size, (1, 2), {layer.name: (1, 2) for layer in group.layers})})
    with mask_(case.model, case.graph, plan) as handle:
        found = score(case.model, case.graph, criterion, [case.batch], case.loss, baseline=dense)
        case.model.conv1.weight.data.fill_(1)
        case.model(case.images)
        assert handle.is_zero()  # the mask is back in force
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_modes_inside():
    case = conv_case()
    case.model.train()
    case.model.bn2.eval()
    seen = {}

    def loss(model, batch):
        seen[mode] = (model.bn1.training, model.bn2.training)
        return case.loss(model, batch)

    for mode in ("eval", "train", "keep"):
        score(case.model, case.graph, GRE(), [case.batch], loss, bn_mode=mode)
    assert seen == {"eval": (False, False), "train": (True, True), "keep": (True, False)}


def test_same_seed_same_scores_with_dropout():
    case = conv_case()

    def loss(model, batch):
        return F.cross_entropy(F.dropout(model(batch[0]), 0.5), batch[1])

    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(score(case.model, case.graph, JRE(), case.split(4), loss)["conv1"])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def nan_batch(case: Case):
    images = case.images.clone()
    images[0, 0, 0, 0] = torch.nan
    return images, case.labels


def unread(case: Case) -> ChannelGraph:
    layer = Layer("conv1", "conv1.weight", 0, 4, identity(4))
    return graph_of(Group("conv1", 4, (layer,), ()))


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (lambda c: score(c.model, c.graph, JRE()), r"JRE.* needs data: pass batches"),
        (lambda c: score(c.model, c.graph, JRE(), c.images, c.loss), r"batches must be an iterable .* one tensor"),
        (lambda c: score(c.model, c.graph, GRE(), [c.batch]), r"GRE.* needs gradients: pass loss"),
        (lambda c: score(c.model, c.graph, GRE(), [], c.loss), r"batches was empty"),
        (
            lambda c: score(c.model, c.graph, GRE(), [c.batch], lambda m, b: m(b[0])),
            r"scalar.*shape \[8, 5\]",
        ),
        (
            lambda c: score(c.model, c.graph, GRE(), [c.batch], lambda m, b: {"loss": 1}),
            r"scalar tensor, got dict",
        ),
        (lambda c: score(c.model, c.graph, GRE(), [c.batch], lambda m, b: c.loss(m, b).detach()), "detach"),
        (
            lambda c: score(c.model, c.graph, GRE(), [nan_batch(c)], c.loss),
            r"conv1: \d of 4 scores are NaN.*batches",
        ),
        (lambda c: score(c.model, c.graph, L1(), bn_mode="frozen"), r"bn_mode.*keep, got 'frozen'"),
        (lambda c: score(c.model, c.graph, "l3"), r"criterion.*'l3'"),
        (lambda c: score(c.model, c.graph, LRE(reference="baseline"), [c.batch], c.loss), "pass baseline"),
        (
            lambda c: score(c.model, c.graph, LRE(reference="baseline"), [c.batch], c.loss, baseline={}),
            r"'conv1.weight' with shape \[4, 3, 3, 3\], found nothing",
        ),
        (
            lambda c: score(c.model, unread(c), GRE(site="activation"), [c.batch], c.loss),
            "conv1: no layer reads",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused_and_nothing_changes(run, words):
    case = conv_case()
    before = snapshot(case.model)
    with pytest.raises(ScoreError, match=words):
        run(case)
    assert_same(before, snapshot(case.model))


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.side, self.fc = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 1)
        self.how = "unused"

    def forward(self, x):
        if self.how == "no_grad":
            with torch.no_grad():
                side = self.side(x)
        else:
            side = self.side(x).detach() if self.how == "detached" else 0
        return self.fc(self.used(x) + side).mean()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("unused", "side: never called"),
        ("no_grad", "side: ran under torch.no_grad"),
        ("detached", "side: no gradient of the loss ever reached it"),
    ],
)
def test_a_layer_that_cannot_be_scored_is_named(how, words):
    model = Branches()
    model.how = how
    layers = tuple(Layer(name, f"{name}.weight", 0, 4, identity(4)) for name in ("used", "side"))
    apart = graph_of(*(Group(layer.name, 4, (layer,), ()) for layer in layers))
    with pytest.raises(ScoreError, match=words):
        score(model, apart, GRE(), [torch.randn(2, 3)], lambda m, b: m(b))
    together = score(model, graph_of(Group("used", 4, layers, ())), GRE(), [torch.randn(2, 3)], lambda m, b: m(b))
    assert torch.equal(together["used"], together.layers["used"]["side"]), "it goes as the others of its group say"
    assert torch.equal(together["used"], together.layers["used"]["used"])


def test_scorer_refuses_misuse():
    case = conv_case()
    scorer = Scorer(case.model, case.graph, GRE())
    scorer.begin_batch()
    case.loss(case.model, case.batch)
    with pytest.raises(ScoreError, match="no backward pass"):
        scorer.end_batch()
    scorer.begin_batch()
    with pytest.raises(ScoreError, match="already open"):
        scorer.begin_batch()
    loss = case.loss(case.model, case.batch)
    loss.backward(retain_graph=True)
    with pytest.raises(ScoreError, match="more than one backward"):
        loss.backward()
    scorer.end_batch()
    with scorer, pytest.raises(ScoreError, match="already in use"):
        scorer.__enter__()
    assert hooks(case.model) == 0
    dense = case.model.state_dict()
    with pytest.raises(ScoreError, match="update"):
        Scorer(case.model, case.graph, LRE(reference="baseline"), baseline=dense).begin_batch()


def test_a_graph_of_another_model_is_refused():
    case, other = conv_case(), residual_case()
    with pytest.raises(PlanError, match="another model"):
        score(other.model, trace(case.model, case.images), L1())
    stranger = graph_of(Group("g", 4, (Layer("conv9", "conv1.weight", 0, 4, identity(4)),), ()))
    with pytest.raises(ScoreError, match="no module 'conv9'"):
        Scorer(case.model, stranger, GRE())
    wrong = graph_of(Group("conv1", 3, (Layer("conv1", "conv1.weight", 0, 3, identity(3)),), ()))
    with pytest.raises(ScoreError, match="expects 3 channels; trace"):
        score(case.model, wrong, GRE(), [case.batch], case.loss)
    with pytest.raises(ScoreError, match="a batch dimension is needed"):
        score(
            case.model.conv1,
            graph_of(Group("g", 4, (Layer("", "weight", 0, 4, identity(4)),), ())),
            LRE(),
            [case.images[0]],
        )
