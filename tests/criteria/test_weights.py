"""Norms, geometric median and random scores against loops; channels that are already zero."""

import pytest
import torch

import lightning_prune as lp
from lightning_prune.criteria import FPGM, L1, L2, Random
from lightning_prune.criteria.scoring import score
from tests.criteria.helpers import close, member
from tests.graph.helpers import CASES, residual_case
from tests.reference import criteria as reference


def layers(graph):
    return [(group.name, layer) for group in graph.groups for layer in group.layers]


def raw_scores(criterion, case):
    found = score(case.model, case.graph, criterion).layers
    return [(layer, found[group][layer.name]) for group, layer in layers(case.graph)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("criterion", "p"), [(L1(normalize="none"), 1), (L2(normalize="none"), 2)])
def test_norms_match_loops(name, criterion, p):
    case = CASES[name]()
    for layer, scores in raw_scores(criterion, case):
        weight = case.model.get_parameter(layer.weight)
        expected = reference.norm(weight, layer.dim, layer.index, p)
        torch.testing.assert_close(scores, torch.tensor(expected).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("distance", ["l2", "l1", "cosine"])
@pytest.mark.parametrize("name", CASES)
def test_geometric_median_matches_loops(name, distance):
    case = CASES[name]()
    for layer, scores in raw_scores(FPGM(distance=distance, normalize="none"), case):
        weight = case.model.get_parameter(layer.weight)
        expected = torch.tensor(
            reference.geometric_median(weight, layer.dim, layer.index, distance), dtype=torch.float64
        )
        torch.testing.assert_close(scores, expected, rtol=1e-7, atol=1e-9)


def test_geometric_median_by_hand():
    points = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 4.0], [1.0, 0.0]])
    # the zero row is not a neighbour: distances 0, sqrt(20), sqrt(20) among the rest
    (scores,) = FPGM(normalize="none").scores([member(points)])
    root = 20**0.5
    torch.testing.assert_close(scores, torch.tensor([-1.0, root, root, 2 * root]).double(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("criterion", [L1(), L2(), FPGM()], ids=repr)
def test_pruned_channels_do_not_change_the_scores_of_others(criterion):
    torch.manual_seed(0)
    weight = torch.randn(6, 5)
    masked = weight.clone()
    masked[[1, 4]] = 0
    keep = [0, 2, 3, 5]
    (scores,) = criterion.scores([member(masked)])
    (reconstructed,) = criterion.scores([member(weight[keep])])
    torch.testing.assert_close(scores[keep], reconstructed)
    assert scores[[1, 4]].max() < scores[keep].min()


def test_the_last_live_channel_beats_the_dead():
    weight = torch.zeros(3, 4)
    weight[1] = 2
    (scores,) = FPGM().scores([member(weight)])
    assert scores.argmax() == 1
    assert scores[1] > scores[0]


def test_transposed_convolution_counts_its_output_filters():
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [-5.0, 0.0]]).view(3, 2, 1, 1)
    (scores,) = L1(normalize="none").scores([member(weight, dim=1)])
    assert scores.tolist() == [9.0, 6.0]


def test_layer_normalization_by_hand():
    weights = [member(torch.tensor([[1.0], [3.0]])), member(torch.tensor([[10.0], [-30.0]]))]
    for how, expected in (
        ("none", [[1, 3], [10, 30]]),
        ("mean", [[0.5, 1.5]] * 2),
        ("max", [[1 / 3, 1.0]] * 2),
    ):
        found = [scores.tolist() for scores in L1(normalize=how).scores(weights)]
        assert found == [pytest.approx(e) for e in expected]


def test_a_layer_of_zeros_scores_zero():
    (scores,) = L2().scores([member(torch.zeros(3, 2))])
    assert scores.tolist() == [0, 0, 0]


def test_random_is_fixed_by_seed_and_layer_and_uniform():
    weight = torch.ones(20000, 1)
    global_state = torch.get_rng_state()
    (one,) = Random(seed=3).scores([member(weight)])
    (again,) = Random(seed=3).scores([member(weight)])
    (other,) = Random(seed=4).scores([member(weight)])
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), global_state)
    counts = torch.histc(one, 10, 0, 1)
    assert counts.min() > 1850
    assert counts.max() < 2150


def test_random_layers_are_independent_and_the_group_stays_uniform():
    case = residual_case()
    scores = score(case.model, case.graph, Random(seed=1))
    parts = scores.layers["stem"]
    assert not torch.equal(parts["stem"], parts["conv2"])
    assert torch.equal(scores["stem"], parts["stem"])


def test_mixed_fpgm_drops_by_norm_first_and_then_by_distance_among_the_survivors():
    torch.manual_seed(0)
    weight = torch.randn(10, 6, dtype=torch.float64)
    weight[3] = 0
    (found,) = FPGM(norm_share=0.3, normalize="none").scores([member(weight)])
    norms = reference.norm(weight, 0, torch.arange(10).unsqueeze(1), 2)
    first, second, third = sorted(range(10), key=norms.__getitem__)[:3]
    assert first == 3
    assert found[3] == -1
    assert -1 < found[second] < found[third] < 0
    others = [i for i in range(10) if i not in (first, second, third)]
    close(found[others], reference.geometric_median(weight[others], 0, torch.arange(7).unsqueeze(1), "l2"))
    (scaled,) = FPGM(norm_share=0.3).scores([member(weight)])
    assert torch.equal(scaled.argsort(), found.argsort())


@pytest.mark.parametrize("normalize", ["none", "max", "mean", "l2", "minmax", "rank", "percentile"])
@pytest.mark.parametrize("kind", [lp.L1, lp.L2, lp.FPGM])
def test_what_is_already_zero_ranks_below_every_live_channel(kind, normalize) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    model[0].weight.data[[2, 5]] = 0
    found = lp.score(model, lp.trace(model, torch.zeros(1, 3)), kind(normalize=normalize))["0"]
    assert set(found.argsort()[:2].tolist()) == {2, 5}
    assert found[[2, 5]].max() < found[[0, 1, 3, 4, 6, 7]].min()
