"""Taylor 2016 and Taylor-FO 2019 against loops and finite differences, and what all Taylor criteria share."""

import pytest
import torch
from torch import nn

import lightning_prune as lp
from lightning_prune.criteria import NextLayerTaylor, Taylor, TaylorFO
from lightning_prune.criteria.scorer import Scorer
from lightning_prune.criteria.scoring import score
from lightning_prune.errors import ScoreError
from tests import zoo
from tests.criteria.helpers import MODELS, assert_same, at, case, close, loss, members, raw, snapshot
from tests.reference import taylor as reference


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("site", ["bn", "conv"])
@pytest.mark.parametrize("definition", ["paper", "jacobgil", "nvlabs"])
def test_taylor_matches_loops(name, site, definition):
    model, graph, images, labels = case(name)
    found = raw(Taylor(definition=definition, site=site, normalize="none"), model, graph, [(images, labels)])
    normalised = raw(Taylor(definition=definition, site=site), model, graph, [(images, labels)])
    for _, layer in members(graph):
        path, last = at(model, layer, site)
        expected = reference.taylor(model, path, images, labels, layer.index, definition, last)
        # a channel of k filters is the sum over them, the mean over the positions of one
        close(found[layer.name], expected)
        close(normalised[layer.name], found[layer.name] / sum(v * v for v in expected) ** 0.5)


def test_behind_a_relu_taylor_is_what_it_is_in_front():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.Flatten())
    zoo.randomise_(model).eval()
    images, labels = zoo.images(4, 5), torch.arange(4)
    graph = lp.trace(model, images)
    before = raw(Taylor(), model, graph, [(images, labels)])
    behind = raw(Taylor(site="activation"), model, graph, [(images, labels)])
    close(behind["0"], before["0"], rtol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_gates_match_finite_differences(name):
    model, graph, images, labels = case(name)
    found = raw(TaylorFO(), model, graph, [(images, labels)])
    each = raw(TaylorFO(reduce="sample"), model, graph, [(images, labels)])
    for _, layer in members(graph):
        path, last = at(model, layer, "bn")
        close(found[layer.name], reference.gates(model, path, images, labels, layer.index, last), rtol=1e-4, atol=1e-12)
        singly = [
            reference.gates(model, path, image[None], label[None], layer.index, last)
            for image, label in zip(images, labels, strict=True)
        ]
        close(each[layer.name], torch.tensor(singly, dtype=torch.float64).mean(0), rtol=1e-3, atol=1e-10)


@pytest.mark.parametrize("training", [False, True])
def test_gates_behind_a_batch_norm_are_its_own_form(training):
    """(g_gamma gamma + g_beta beta)^2, also where the statistics are those of the batch."""
    model, graph, images, labels = case("Vgg")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train(training)
    with Scorer(model, graph, TaylorFO(), bn_mode="keep") as scorer:
        scorer.update(lambda: loss(model, (images, labels)))
    norm = model.features[0][1]
    gamma, beta = torch.autograd.grad(loss(model, (images, labels)), (norm.weight, norm.bias))
    expected = (gamma * norm.weight + beta * norm.bias).square().detach()
    close(scorer.compute().layers["features.0.0"]["features.0.0"], expected)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", [*MODELS, "Shared"])
def test_weight_form_matches_loops_also_when_frozen(name, frozen):
    model, graph, images, labels = case(name)
    expected = {
        layer.name: reference.weight_squares(model, layer.weight, layer.dim, images, labels, layer.index)
        for _, layer in members(graph)
    }
    model.requires_grad_(not frozen)
    before = snapshot(model)
    found = raw(TaylorFO(form="weight"), model, graph, [(images, labels)])
    assert_same(before, snapshot(model))
    for name, scores in found.items():
        close(scores, expected[name])


@pytest.mark.parametrize("name", ["Residual", "Grouped"])
@pytest.mark.parametrize(
    "criterion",
    [
        *(Taylor(definition=d) for d in ("paper", "jacobgil", "nvlabs")),
        TaylorFO(reduce="sample"),
        NextLayerTaylor(),
        NextLayerTaylor(magnitude="square"),
        NextLayerTaylor(magnitude="signed"),
    ],
    ids=repr,
)
def test_one_batch_of_64_is_two_of_32(name, criterion):
    model, graph, images, labels = case(name, 64)
    batch = (images, labels)
    halves = list(zip(images.split(32), labels.split(32), strict=True))
    whole, split = (score(model, graph, criterion, batches, loss) for batches in ([batch], halves))
    again = score(model, graph, criterion, [batch], loss)
    for group in whole:
        close(split[group], whole[group], rtol=1e-10)
        assert torch.equal(again[group], whole[group])


@pytest.mark.parametrize("criterion", [TaylorFO(), TaylorFO(form="weight"), NextLayerTaylor(form="weight")], ids=repr)
def test_where_the_gradient_is_that_of_a_batch_scores_are_means_over_batches(criterion):
    model, graph, images, labels = case("Residual")
    batches = list(zip(images.split(2), labels.split(2), strict=True))
    assert isinstance(criterion, TaylorFO | NextLayerTaylor)
    plain = type(criterion)(form=criterion.form, normalize="none")
    both = raw(plain, model, graph, batches)
    each = [raw(plain, model, graph, [batch]) for batch in batches]
    for name, scores in both.items():
        close(scores, (each[0][name] + each[1][name]) / 2)


@pytest.mark.parametrize(
    "criterion", [Taylor(), TaylorFO(form="weight"), NextLayerTaylor(), NextLayerTaylor(form="weight")], ids=repr
)
def test_the_trainers_own_backward_gives_the_same_and_frozen_weights_keep_no_gradient(criterion):
    model, graph, images, labels = case("Grouped")
    expected = score(model, graph, criterion, [(images, labels)], loss)
    model.a[0].weight.requires_grad_(False)
    scorer = Scorer(model, graph, criterion, bn_mode="keep")
    scorer.begin_batch()
    loss(model, (images, labels)).backward()
    scorer.end_batch()
    assert model.a[0].weight.grad is None
    assert not model.a[0].weight.requires_grad
    assert model.b[0].weight.grad is not None
    for group, scores in scorer.compute().items():
        close(scores, expected[group])


@pytest.mark.parametrize("criterion", [NextLayerTaylor(), TaylorFO(form="weight")], ids=repr)
def test_a_second_backward_pass_is_refused(criterion):
    model, graph, images, labels = case("Plain")
    scorer = Scorer(model, graph, criterion)
    scorer.begin_batch()
    value = loss(model, (images, labels))
    value.backward(retain_graph=True)
    with pytest.raises(ScoreError, match="more than one backward pass"):
        value.backward()
    scorer.end_batch(discard=True)
