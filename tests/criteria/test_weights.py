"""Norms, geometric median, random scores, and what every criterion has in common."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch

import lightning_prune.criteria as criteria
from lightning_prune.criteria import (
    DCP,
    FPGM,
    GRE,
    JRE,
    L1,
    L2,
    LRE,
    APoZ,
    BNScale,
    Criterion,
    Member,
    NextLayerTaylor,
    Random,
    Taylor,
    TaylorFO,
    ThiNet,
    criterion_from,
    functional,
)
from lightning_prune.criteria.scoring import score
from lightning_prune.errors import ScoreError
from lightning_prune.graph.groups import Layer
from tests.graph.helpers import CASES, conv_case, graph_of, grouped_case, identity, residual_case
from tests.reference import criteria as reference

ALL = [
    *(L1(), L2(), FPGM(norm_share=0.1), Random(seed=7), GRE(), LRE(), JRE(), BNScale(missing="keep"), APoZ(eps=0.5)),
    *(Taylor(definition="nvlabs"), TaylorFO(form="weight"), NextLayerTaylor(form="weight", chunk=3), ThiNet(rows=5)),
    DCP(heads=1),
]


def layers(graph):
    return [(group.name, layer) for group in graph.groups for layer in group.layers]


def member(weight, index=None, dim=0):
    index = identity(weight.shape[dim]) if index is None else index
    return Member("g", Layer("l", "l.weight", dim, weight.shape[dim], index), weight)


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


def test_group_score_combines_members():
    case = residual_case()
    for how, expected in (("mean", lambda a, b: (a + b) / 2), ("sum", torch.add), ("max", torch.maximum)):
        scores = score(case.model, case.graph, L2(combine=how))
        parts = scores.layers["stem"]
        assert list(parts) == ["stem", "conv2"]
        torch.testing.assert_close(scores["stem"], expected(parts["stem"], parts["conv2"]))


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


def test_normalizers_match_loops():
    values = [3.0, -1.0, 3.0, 10.0, 0.5]
    tensor = torch.tensor(values, dtype=torch.float64)
    assert functional.normalize(tensor, "minmax").tolist() == pytest.approx(reference.minmax(values))
    assert functional.normalize(tensor, "rank").tolist() == pytest.approx(reference.rank(values))
    for how in ("minmax", "rank", "percentile"):
        assert functional.normalize(torch.full((3,), 2.0), how).tolist() == [0, 0, 0]


def test_percentile_normalizer_is_not_squeezed_by_one_outlier():
    values = torch.arange(100, dtype=torch.float64)
    values[99] = 1e6
    squeezed, robust = functional.normalize(values, "minmax"), functional.normalize(values, "percentile")
    assert squeezed[50] < 1e-4
    assert robust[50] == pytest.approx((50 - 4.95) / (94.05 - 4.95))
    assert torch.equal(robust.argsort(), values.argsort())


@pytest.mark.parametrize("criterion", ALL, ids=repr)
def test_criteria_have_an_evaluable_repr_and_copy(criterion):
    assert eval(repr(criterion), vars(criteria)) == criterion
    assert copy.deepcopy(criterion) == criterion
    assert pickle.loads(pickle.dumps(criterion)) == criterion
    assert len({criterion, copy.deepcopy(criterion)}) == 1
    assert criterion_from(type(criterion).__name__.lower()) == type(criterion)()
    assert criterion_from(criterion) is criterion


def test_every_exported_criterion_is_tested():
    exported = {
        cls
        for name in criteria.__all__
        if isinstance(cls := getattr(criteria, name), type)
        and issubclass(cls, Criterion)
        and not cls.__abstractmethods__
    }
    assert exported == {type(criterion) for criterion in ALL}


def test_needs():
    needs = {type(c).__name__: (c.needs_forward, c.needs_backward, c.needs_reference) for c in ALL}
    assert needs["L1"] == needs["L2"] == needs["FPGM"] == needs["Random"] == (False, False, False)
    assert needs["LRE"] == (True, False, False)
    assert needs["GRE"] == needs["JRE"] == (True, True, False)
    assert JRE(alpha=0, reference="baseline").needs_reference
    assert not JRE(alpha=0).needs_backward


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: L1(normalize="median"), ["normalize", "'mean'", "'median'"]),
        (lambda: L2(combine="first"), ["combine", "'max'", "'first'"]),
        (lambda: FPGM(distance="l3"), ["distance", "'cosine'", "'l3'"]),
        (lambda: Random(seed=-1), ["seed", "-1"]),
        (lambda: GRE(site="relu"), ["site", "'bn'", "'relu'"]),
        (lambda: GRE(magnitude="l1"), ["magnitude", "'square'", "'l1'"]),
        (lambda: LRE(spatial="max"), ["spatial", "'sum'", "'max'"]),
        (lambda: LRE(reference="dense"), ["reference", "'baseline'", "'dense'"]),
        (lambda: JRE(reduce="none"), ["reduce", "'element'", "'none'"]),
        (lambda: JRE(scope="model"), ["scope", "'network'", "'model'"]),
        (lambda: JRE(normalize="z"), ["normalize", "'percentile'", "'z'"]),
        (lambda: JRE(alpha=-1), ["alpha", "-1"]),
        (lambda: JRE(beta=float("nan")), ["beta", "nan"]),
        (lambda: JRE(alpha=0, beta=0), ["alpha", "beta"]),
        (lambda: criterion_from("l7"), ["criterion", "'l7'", "fpgm"]),
    ],
)
def test_bad_settings_are_refused_by_name(build, words):
    with pytest.raises(ScoreError) as error:
        build()
    assert all(word in str(error.value) for word in words)


def test_a_criterion_takes_one_class_and_no_registration():
    class Largest(criteria.WeightCriterion):
        normalize = "none"

        def __init__(self):
            pass

        def channel_scores(self, rows):
            return rows.abs().amax(1)

    case = grouped_case()
    expected = case.model.grouped.weight.abs().amax((1, 2, 3)).view(2, 4).amax(0)
    torch.testing.assert_close(score(case.model, case.graph, Largest())["grouped"], expected.detach())


def test_nan_weights_are_refused_with_the_layer():
    case = conv_case()
    case.model.conv2.weight.data[1, 0, 0, 0] = torch.nan
    for criterion in (L1(), FPGM(), L2(normalize="none")):
        with pytest.raises(ScoreError, match=r"conv2: \d of 6 scores are NaN.*weights hold NaN"):
            score(case.model, case.graph, criterion)


def test_unprunable_groups_are_not_scored():
    case = conv_case()
    first, second = case.graph.groups
    graph = graph_of(replace(first, reason="reaches the output"), second)
    assert list(score(case.model, graph, L1())) == ["conv2"]
