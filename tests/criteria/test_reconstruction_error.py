"""GRE, LRE and JRE against masks, finite differences and loops; by hand; and what must not change them."""

import pytest
import torch
from torch import nn

from lightning_prune.criteria import GRE, JRE, LRE
from lightning_prune.criteria.scorer import Scorer
from lightning_prune.criteria.scoring import score
from lightning_prune.graph.groups import Group, Layer
from tests.graph.helpers import CASES, Case, conv_case, graph_of, identity, residual_case
from tests.reference import criteria as reference


def terms(criterion, case: Case, batches=None):
    """{layer: raw mean of its only tap}: what normalisation starts from."""
    with Scorer(case.model, case.graph, criterion) as scorer:
        for batch in batches or [case.batch]:
            scorer.update(lambda batch=batch: case.loss(case.model, batch))
    (tap,) = criterion.taps
    found = {}
    for group in case.graph.groups:
        for layer in group.layers:
            key = f"{group.name}/{layer.name}/{tap.name}"
            found[layer.name] = scorer.state[f"{key}/sum"] / scorer.state[f"{key}/count"]
    return found


def members(case: Case):
    return [layer for group in case.graph.groups for layer in group.layers]


def produced_at(case: Case, layer: Layer, site: str):
    """(module whose output is the tensor at the site, its channel index, whether channels come last)."""
    module = case.model.get_submodule
    if site == "activation":
        path = case.producers[layer.name]
        return path, layer.reader_index, isinstance(module(layer.reader), nn.Linear)
    path = layer.norm if site == "bn" and layer.norm else layer.name
    return path, layer.index, isinstance(module(path), nn.Linear)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("site", ["bn", "conv", "activation"])
@pytest.mark.parametrize(("magnitude", "reduce"), [("abs", "sample"), ("square", "batch"), ("signed", "sample")])
def test_global_term_is_the_change_of_the_loss_under_a_multiplier(name, site, magnitude, reduce):
    case = CASES[name]()
    found = terms(GRE(magnitude=magnitude, reduce=reduce, site=site), case)
    checked = 0
    for layer in members(case):
        if site == "activation" and layer.name not in case.producers:
            continue  # no module of its own produces that tensor
        path, index, last = produced_at(case, layer, site)
        products = reference.signed_taylor(case.model, path, case.images, case.labels, index, last)
        expected = torch.tensor(reference.reduce_taylor(products, magnitude, reduce), dtype=torch.float64)
        torch.testing.assert_close(found[layer.name], expected, rtol=1e-6, atol=1e-9)
        checked += 1
    assert checked or name == "residual"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("magnitude", "power"), [("abs", 1), ("square", 2)])
def test_elementwise_global_term_matches_masks_of_every_element(name, magnitude, power):
    case = CASES[name]()
    found = terms(GRE(magnitude=magnitude, reduce="element"), case)
    for layer in members(case):
        path, index, last = produced_at(case, layer, "bn")
        each = [
            reference.element_taylor(case.model, path, image, label, power, index, last)
            for image, label in zip(case.images, case.labels, strict=True)
        ]
        torch.testing.assert_close(found[layer.name], torch.tensor(each, dtype=torch.float64).mean(0))


def test_activation_site_takes_the_gradient_of_everything_that_reads_the_tensor():
    """In the residual net the tensor that enters conv1 is also the identity of the addition."""
    case = residual_case()
    found = terms(GRE(site="activation"), case)
    expected = []
    for image, label in zip(case.images, case.labels, strict=True):
        model = case.model
        x = model.relu(model.stem_bn(model.stem(image[None]))).detach().requires_grad_()
        out = model.relu(model.bn1(model.conv1(x)))
        out = model.relu(model.bn2(model.conv2(out)) + x)
        pooled = out.mean((2, 3))
        loss = nn.functional.cross_entropy(model.fc(pooled), label[None])
        gradients = torch.autograd.grad(loss, (x, pooled))
        expected.append(((gradients[0] * x).sum((0, 2, 3)).abs().detach(), (gradients[1] * pooled)[0].abs().detach()))
    torch.testing.assert_close(found["stem"], torch.stack([one for one, _ in expected]).mean(0))
    torch.testing.assert_close(found["conv2"], torch.stack([other for _, other in expected]).mean(0))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("spatial", ["sum", "mean"])
def test_local_term_matches_loops(name, spatial):
    case = CASES[name]()
    found = terms(LRE(spatial=spatial), case)
    for layer in members(case):
        path, index, last = produced_at(case, layer, "conv")
        expected = reference.local_energy(case.model, path, case.images, index, spatial, last)
        torch.testing.assert_close(found[layer.name], torch.tensor(expected, dtype=torch.float64))


def two_channels() -> Case:
    """x -> (2x, -x) -> sum with weights (1, 3); loss = mean over samples of the output."""
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Conv2d(2, 1, 1, bias=False)).double()
    model[0].weight.data.copy_(torch.tensor([2.0, -1.0]).view(2, 1, 1, 1))
    model[1].weight.data.copy_(torch.tensor([1.0, 3.0]).view(1, 2, 1, 1))
    layer = Layer("0", "0.weight", 0, 2, identity(2), None, "1", identity(2))
    images = torch.tensor([[1.0, 2.0], [-1.0, 0.0]], dtype=torch.float64).view(2, 1, 1, 2)
    case = Case(model, graph_of(Group("0", 2, (layer,), ())), images, torch.zeros(2, dtype=torch.long), {})
    case.loss = lambda model, batch: model(batch[0]).sum((1, 2, 3)).mean()  # type: ignore[method-assign]
    return case


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        # g*h per position: channel 0: 1*2x, channel 1: 3*(-x); x = (1, 2) and (-1, 0)
        (GRE(), [(6 + 2) / 2, (9 + 3) / 2]),
        (GRE(magnitude="signed"), [(6 - 2) / 2, (-9 + 3) / 2]),
        (GRE(magnitude="square"), [(36 + 4) / 2, (81 + 9) / 2]),
        (GRE(reduce="batch"), [2, 3]),
        (GRE(reduce="element"), [(3 + 1) / 2, (4.5 + 1.5) / 2]),
        (GRE(reduce="element", magnitude="square"), [(10 + 2) / 2, (22.5 + 4.5) / 2]),
        # z*z: channel 0: (4, 16) and (4, 0); channel 1: (1, 4) and (1, 0)
        (LRE(), [(20 + 4) / 2, (5 + 1) / 2]),
        (LRE(spatial="mean"), [(10 + 2) / 2, (2.5 + 0.5) / 2]),
    ],
    ids=repr,
)
def test_two_channels_by_hand(criterion, expected):
    assert terms(criterion, two_channels())["0"].tolist() == pytest.approx(expected)


def test_joint_score_by_hand():
    case = two_channels()
    # GRE (4, 6) -> (0, 1); LRE (12, 3) -> (1, 0)
    scores = score(case.model, case.graph, JRE(alpha=0.5, beta=2), [case.batch], case.loss)
    assert scores["0"].tolist() == [2.0, 0.5]


def test_joint_score_matches_loops():
    case = residual_case()
    scores = score(case.model, case.graph, JRE(), [case.batch], case.loss)
    both = {}
    for layer in members(case):
        path, index, last = produced_at(case, layer, "bn")
        products = reference.signed_taylor(case.model, path, case.images, case.labels, index, last)
        gre = reference.minmax(reference.reduce_taylor(products, "abs", "sample"))
        lre = reference.minmax(reference.local_energy(case.model, layer.name, case.images, index, "sum"))
        both[layer.name] = torch.tensor([a + b for a, b in zip(gre, lre, strict=True)], dtype=torch.float64)
    torch.testing.assert_close(scores["conv1"], both["conv1"], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(scores["stem"], (both["stem"] + both["conv2"]) / 2, rtol=1e-6, atol=1e-8)


def test_network_scope_has_one_minimum_and_one_maximum():
    case = conv_case()
    layer = score(case.model, case.graph, GRE(), [case.batch], case.loss)
    network = score(case.model, case.graph, GRE(scope="network"), [case.batch], case.loss)
    together = torch.cat(list(network.values()))
    assert sorted(layer[name].min().item() for name in layer) == [0, 0]
    assert (together.min(), together.max()) == (0, 1)
    assert sorted(bool(network[name].max() == 1) for name in network) == [False, True]
    raw = torch.cat(list(terms(GRE(), case).values()))
    assert torch.equal(together.argsort(), raw.argsort())
    for name in layer:
        assert torch.equal(layer[name].argsort(), network[name].argsort())


@pytest.mark.parametrize("normalize", ["minmax", "rank", "percentile"])
@pytest.mark.parametrize("scope", ["layer", "network"])
def test_ablations_of_the_joint_error_rank_as_its_terms(normalize, scope):
    case = residual_case()
    settings = {"normalize": normalize, "scope": scope}
    for joint, alone in (
        (JRE(beta=0, **settings), GRE(**settings)),
        (JRE(alpha=0, **settings), LRE(**settings)),
    ):
        one = score(case.model, case.graph, joint, [case.batch], case.loss)
        other = score(case.model, case.graph, alone, [case.batch], case.loss)
        for name in one:
            torch.testing.assert_close(one[name], other[name])


@pytest.mark.parametrize(
    "criterion",
    [
        JRE(),
        JRE(magnitude="square", spatial="mean"),
        GRE(reduce="element"),
        GRE(reduce="element", magnitude="square"),
        GRE(reduce="dataset"),
        LRE(),
    ],
    ids=repr,
)
def test_scores_do_not_depend_on_the_split_into_batches(criterion):
    case = conv_case()
    whole = score(case.model, case.graph, criterion, [case.batch], case.loss)
    for size in (1, 3, 4):
        split = score(case.model, case.graph, criterion, case.split(size), case.loss)
        for name in whole:
            torch.testing.assert_close(split[name], whole[name])


def test_dataset_reduction_cancels_signs_over_batches_and_batch_reduction_within_one():
    case = conv_case()
    signed = terms(GRE(magnitude="signed"), case)
    by_dataset = score(case.model, case.graph, GRE(reduce="dataset"), case.split(4), case.loss)
    for layer in members(case):
        expected = torch.tensor(reference.minmax(signed[layer.name].abs().tolist())).double()
        torch.testing.assert_close(by_dataset.layers[layer.name][layer.name], expected, rtol=1e-6, atol=1e-7)
    halves = [terms(GRE(magnitude="signed"), case, [half]) for half in case.split(4)]
    by_batch = terms(GRE(reduce="batch"), case, case.split(4))
    for name, found in by_batch.items():
        torch.testing.assert_close(found, (halves[0][name].abs() + halves[1][name].abs()) / 2)


def test_baseline_reference_takes_the_energy_of_the_dense_model():
    case = conv_case()
    dense = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    criterion = LRE(reference="baseline")
    first = score(case.model, case.graph, criterion, [case.batch], case.loss, baseline=dense)
    same = score(case.model, case.graph, LRE(), [case.batch], case.loss)
    for name in first:
        torch.testing.assert_close(first[name], same[name])  # round one
    pruned = case.model.conv1
    pruned.weight.data[0] = 0
    later = score(case.model, case.graph, criterion, [case.batch], case.loss, baseline=dense)
    own = score(case.model, case.graph, LRE(), [case.batch], case.loss)
    for name in first:
        torch.testing.assert_close(later[name], first[name])
    assert not torch.allclose(own["conv2"], first["conv2"])
    assert not pruned.weight[0].any()
    joint = score(case.model, case.graph, JRE(reference="baseline"), [case.batch], case.loss, baseline=dense)
    gre = score(case.model, case.graph, GRE(), [case.batch], case.loss)
    for name in joint:
        torch.testing.assert_close(joint[name], gre[name] + first[name])
