"""The scorer: hooks, restoration, refusals, shared and frozen modules, in-place operations, traced graphs."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_prune.criteria import FPGM, GRE, JRE, L1, LRE
from lightning_prune.errors import PlanError, ScoreError
from lightning_prune.graph import trace
from lightning_prune.graph.groups import ChannelGraph, Group, Layer
from lightning_prune.masking import mask_
from lightning_prune.plan import GroupPlan, Plan
from lightning_prune.scoring import Scorer, Scores, score
from tests.helpers_graph import CASES, Case, conv_case, graph_of, identity, linear_case, residual_case


class Interrupt(Exception):
    pass


def hooks(model):
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        for module in model.modules()
    )


def snapshot(model):
    return {
        "modes": [module.training for module in model.modules()],
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "ids": [id(tensor) for tensor in (*model.parameters(), *model.buffers())],
        "grad_ids": [id(parameter.grad) for parameter in model.parameters()],
        "grads": [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None],
        "flags": [parameter.requires_grad for parameter in model.parameters()],
        "hooks": hooks(model),
        "random": (random.getstate()[1], np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),
    }


def assert_same(before, after):
    assert before.keys() == after.keys()
    for key in before:
        if key == "tensors":
            assert all(torch.equal(before[key][name], after[key][name]) for name in before[key])
        elif key == "grads":
            assert len(before[key]) == len(after[key])
            assert all(torch.equal(a, b) for a, b in zip(before[key], after[key], strict=True))
        else:
            assert before[key] == after[key], key


def disturbed(case: Case):
    """A loss that uses randomness, accumulates gradients, flips modes and flags."""

    def loss(model, batch):
        torch.rand(3), np.random.rand(), random.random()
        model.bn1.training = not model.bn1.training
        model.conv1.weight.requires_grad_(True)
        images, labels = batch
        F.cross_entropy(model(images), labels).backward()
        return F.cross_entropy(model(images + torch.randn_like(images)), labels)

    return loss


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
        model.fc.weight.sum().backward()
        return case.loss(model, batch)

    score(case.model, case.graph, GRE(), [case.batch], loss)
    assert_same(before, snapshot(case.model))


@pytest.mark.parametrize("fails", [False, True])
def test_baseline_weights_are_taken_out_again(fails):
    case = conv_case()
    dense = {
        name: torch.randn_like(t) if t.is_floating_point() else t
        for name, t in case.model.state_dict().items()
    }
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


def test_only_sites_are_differentiated():
    case = conv_case()
    arrived = []
    handle = case.model.conv2.weight.register_hook(arrived.append)
    score(case.model, case.graph, GRE(), [case.batch], case.loss)
    handle.remove()
    assert arrived == []


def incremental(case: Case, criterion, run):
    scorer = Scorer(case.model, case.graph, criterion)
    with scorer:
        for batch in case.split(4):
            run(scorer, batch)
    return scorer.compute()


def test_incremental_use_and_the_trainers_own_backward_agree_with_score():
    case = conv_case()

    def by_backward(scorer, batch):
        with scorer.batch():
            scorer.backward(case.loss(case.model, batch))

    def by_trainer(scorer, batch):
        scorer.begin_batch()
        case.loss(case.model, batch).backward()
        scorer.end_batch()

    expected = score(case.model, case.graph, JRE(), case.split(4), case.loss)
    for run in (by_backward, by_trainer):
        found = incremental(case, JRE(), run)
        for name in expected:
            torch.testing.assert_close(found[name], expected[name])


def test_watching_training_without_with_leaves_gradients_to_the_trainer():
    case = conv_case()
    scorer = Scorer(case.model, case.graph, GRE())
    scorer.end_batch()  # none open: nothing happens
    scorer.begin_batch()
    case.loss(case.model, case.batch).backward()
    scorer.end_batch()
    assert case.model.conv1.weight.grad is not None
    assert hooks(case.model) == 0
    assert scorer.compute()["conv1"].isfinite().all()


def test_a_failed_batch_is_not_counted():
    case = conv_case()
    first, second = case.split(4)

    def fail(model, batch):
        case.loss(model, batch)
        raise Interrupt

    with Scorer(case.model, case.graph, LRE()) as scorer:
        scorer.update(lambda: case.loss(case.model, first))
        with pytest.raises(Interrupt):
            scorer.update(lambda: fail(case.model, second))
    expected = score(case.model, case.graph, LRE(), [first], case.loss)
    assert torch.equal(scorer.compute()["conv1"], expected["conv1"])


def test_state_sums_can_be_reduced_over_processes():
    case = conv_case()
    parts = []
    for batch in (case.split(5)[0], case.split(5)[1]):
        with Scorer(case.model, case.graph, JRE()) as scorer:
            scorer.update(lambda batch=batch: case.loss(case.model, batch))
        parts.append(scorer)
    for key, tensor in parts[0].state.items():
        assert tensor.dtype == torch.float64
        tensor += parts[1].state[key]
    whole = score(case.model, case.graph, JRE(), [case.batch], case.loss)
    for name, found in parts[0].compute().items():
        torch.testing.assert_close(found, whole[name])


def test_forward_criteria_run_under_no_grad_without_a_loss():
    case = conv_case()
    enabled = []
    handle = case.model.fc.register_forward_hook(lambda *_: enabled.append(torch.is_grad_enabled()))
    by_model = score(case.model, case.graph, LRE(), [case.images])
    handle.remove()
    assert enabled == [False]
    by_keyword = score(case.model, case.graph, LRE(), [{"x": case.images}])
    by_loss = score(case.model, case.graph, LRE(), [case.batch], case.loss)
    for name in by_model:
        assert torch.equal(by_model[name], by_loss[name])
        assert torch.equal(by_model[name], by_keyword[name])


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_scoring_works_where_gradients_are_off(context):
    case = conv_case()
    with context():
        inside = score(case.model, case.graph, GRE(), [case.batch], case.loss)
    outside = score(case.model, case.graph, GRE(), [case.batch], case.loss)
    assert torch.equal(inside["conv1"], outside["conv1"])


class InPlace(nn.Module):
    """bn -> in-place op -> reader; the plain twin computes the same out of place."""

    def __init__(self, inplace):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)
        self.inplace = inplace

    def forward(self, x):
        x = self.bn(self.conv(x))
        if self.inplace:
            x += x.detach()
            x.relu_()
        else:
            x = (x + x.detach()).relu()
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("site", ["bn", "conv"])
def test_in_place_operations_change_neither_value_nor_gradient(site, frozen):
    torch.manual_seed(0)
    plain, inplace = InPlace(False).double(), InPlace(True).double()
    inplace.load_state_dict(plain.state_dict())
    graph = graph_of(Group("conv", 4, (Layer("conv", "conv.weight", 0, 4, identity(4), "bn"),), ()))
    images, labels = torch.randn(6, 3, 5, 5).double(), torch.randint(5, (6,))
    found = []
    for model in (plain, inplace):
        if frozen and model is inplace:
            model.requires_grad_(False)
        loss = lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
        found.append(score(model, graph, GRE(site=site, scope="network"), [(images, labels)], loss)["conv"])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("site", ["bn", "conv", "activation"])
@pytest.mark.parametrize("name", CASES)
def test_frozen_parameters_score_as_trainable_ones(name, site):
    case = CASES[name]()
    expected = score(case.model, case.graph, JRE(site=site), [case.batch], case.loss)
    case.model.requires_grad_(False)
    frozen = score(case.model, case.graph, JRE(site=site), [case.batch], case.loss)
    for group in expected:
        torch.testing.assert_close(frozen[group], expected[group])
    assert not any(parameter.requires_grad for parameter in case.model.parameters())


def test_a_layer_called_twice_sums_its_calls_before_the_absolute_value():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 1, 1)

        def forward(self, x):
            return self.head(self.conv(x)).mean((1, 2, 3)) - self.head(self.conv(2 * x)).mean((1, 2, 3))

    torch.manual_seed(0)
    model = Shared().double()
    images = torch.randn(5, 3, 2, 2).double()
    graph = graph_of(Group("conv", 4, (Layer("conv", "conv.weight", 0, 4, identity(4)),), ()))
    with Scorer(model, graph, JRE(magnitude="abs")) as scorer:
        scorer.update(lambda: model(images).mean())
    maps = model.conv(images).detach()
    weight = model.head.weight.view(1, 4, 1, 1).detach()
    # d/dz of the first call is w/4 per position, of the second -w/4, and its map is twice as large
    expected = (weight * (maps - 2 * maps) / 4).sum((2, 3)).abs().sum(0)
    torch.testing.assert_close(scorer.state["conv/conv/global/sum"], expected)
    torch.testing.assert_close(scorer.state["conv/conv/local/sum"], 5 * maps.square().sum((0, 2, 3)))
    assert scorer.state["conv/conv/global/count"] == 5


def test_activation_checkpointing_counts_once():
    case = conv_case()
    expected = score(case.model, case.graph, JRE(), [case.batch], case.loss)

    def loss(model, batch):
        return F.cross_entropy(checkpoint(model, batch[0], use_reentrant=False), batch[1])

    found = score(case.model, case.graph, JRE(), [case.batch], loss)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_half_precision_is_summed_in_float32():
    case = linear_case()
    model = case.model.to(torch.bfloat16)
    scores = score(model, case.graph, JRE(), [(case.images.bfloat16(), case.labels)], case.loss)
    assert all(values.dtype == torch.float64 and values.isfinite().all() for values in scores.values())
    layer = case.graph.groups[0].layers[0]
    with Scorer(model, case.graph, LRE()) as scorer:
        scorer.update(lambda: model(case.images.bfloat16()))
    z = model.fc1(case.images.bfloat16().flatten(2).transpose(1, 2)).detach()
    expected = z.double().square().sum((0, 1))
    torch.testing.assert_close(scorer.state[f"fc1/{layer.name}/local/sum"], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_traced_graphs_score_as_hand_written_ones(name):
    case = CASES[name]()
    graph = trace(case.model, case.images)
    for criterion in (L1(), FPGM(), JRE(), JRE(site="activation")):
        expected = score(case.model, case.graph, criterion, [case.batch], case.loss)
        found = score(case.model, graph, criterion, [case.batch], case.loss)
        layers = {layer: values for group in found.layers.values() for layer, values in group.items()}
        for members in expected.layers.values():
            for layer, values in members.items():
                torch.testing.assert_close(layers[layer], values)


def test_scores_survive_a_round_trip():
    case = residual_case()
    scores = score(case.model, case.graph, L1())
    again = Scores.from_dict(scores.to_dict())
    assert again.keys() == scores.keys()
    assert {group: list(of) for group, of in again.layers.items()} == {
        "stem": ["stem", "conv2"],
        "conv1": ["conv1"],
    }
    assert torch.equal(again["stem"], scores["stem"])
    with pytest.raises(ScoreError, match="not scores"):
        Scores.from_dict({"conv1": 1})


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
        (lambda c: score(c.model, c.graph, JRE(), c.images, c.loss), r"needs data: pass batches=.*iterable"),
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
        (lambda c: score(c.model, c.graph, L1(), bn_mode="frozen"), r"bn_mode.*'keep', got 'frozen'"),
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
    with pytest.raises(ScoreError, match=words):
        score(model, graph_of(Group("used", 4, layers, ())), GRE(), [torch.randn(2, 3)], lambda m, b: m(b))


def test_scorer_refuses_misuse():
    case = conv_case()
    scorer = Scorer(case.model, case.graph, GRE())
    with pytest.raises(ScoreError, match="no backward pass"), scorer.batch():
        case.loss(case.model, case.batch)
    with pytest.raises(ScoreError, match="already open"), scorer.batch():
        scorer.begin_batch()
    with pytest.raises(ScoreError, match="more than one backward"), scorer.batch():
        loss = case.loss(case.model, case.batch)
        loss.backward(retain_graph=True)
        loss.backward()
    with pytest.raises(ScoreError, match="8 and with 4 samples"), scorer.batch():
        case.loss(case.model, case.batch)
        case.loss(case.model, case.split(4)[0])
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
    with pytest.raises(ScoreError, match="no module 'conv9'"):
        layer = Layer("conv9", "conv1.weight", 0, 4, identity(4))
        Scorer(case.model, graph_of(Group("g", 4, (layer,), ())), GRE())
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
