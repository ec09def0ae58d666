"""What every criterion has in common: settings, repr, copies, names, what it needs, groups."""

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
    NextLayerTaylor,
    Random,
    Taylor,
    TaylorFO,
    ThiNet,
    criterion_from,
)
from lightning_prune.criteria.scoring import score
from lightning_prune.errors import ScoreError
from tests.graph.helpers import conv_case, graph_of, grouped_case, residual_case

ALL = [
    *(L1(), L2(), FPGM(norm_share=0.1), Random(seed=7), GRE(), LRE(), JRE(), BNScale(missing="keep"), APoZ(eps=0.5)),
    *(Taylor(definition="nvlabs"), TaylorFO(form="weight"), NextLayerTaylor(form="weight", chunk=3), ThiNet(rows=5)),
    DCP(heads=1),
]


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


@pytest.mark.parametrize("criterion", ALL, ids=repr)
def test_names_are_those_of_the_classes_in_lower_case(criterion):
    name = {"BNScale": "bn_scale", "TaylorFO": "taylor_fo", "NextLayerTaylor": "next_layer_taylor"}
    kind = type(criterion)
    assert criterion_from(name.get(kind.__name__, kind.__name__.lower())) == criterion_from(kind.__name__) == kind()


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: L1(normalize="median"), ["normalize", "mean", "'median'"]),
        (lambda: L2(combine="first"), ["combine", "max", "'first'"]),
        (lambda: FPGM(distance="l3"), ["distance", "cosine", "'l3'"]),
        (lambda: Random(seed=-1), ["seed", "-1"]),
        (lambda: GRE(site="relu"), ["site", "bn", "'relu'"]),
        (lambda: GRE(magnitude="l1"), ["magnitude", "square", "'l1'"]),
        (lambda: LRE(spatial="max"), ["spatial", "sum", "'max'"]),
        (lambda: LRE(reference="dense"), ["reference", "baseline", "'dense'"]),
        (lambda: JRE(reduce="none"), ["reduce", "element", "'none'"]),
        (lambda: JRE(scope="model"), ["scope", "network", "'model'"]),
        (lambda: JRE(normalize="z"), ["normalize", "percentile", "'z'"]),
        (lambda: JRE(alpha=-1), ["alpha", "-1"]),
        (lambda: JRE(beta=float("nan")), ["beta", "nan"]),
        (lambda: JRE(alpha=0, beta=0), ["alpha", "beta"]),
        (lambda: Taylor(definition="guo"), ["definition", "paper", "'guo'"]),
        (lambda: Taylor(normalize="l3"), ["normalize", "l2", "'l3'"]),
        (lambda: TaylorFO(form="bn"), ["form", "gate", "'bn'"]),
        (lambda: TaylorFO(form="weight", reduce="sample"), ["reduce", "gate"]),
        (lambda: NextLayerTaylor(form="conv"), ["form", "output", "'conv'"]),
        (lambda: NextLayerTaylor(chunk=0), ["chunk", "0"]),
        (lambda: FPGM(norm_share=1.0), ["norm_share", "[0, 1)"]),
        (lambda: BNScale(missing="skip"), ["missing", "refuse", "'skip'"]),
        (lambda: APoZ(eps=-1), ["eps", "-1"]),
        (lambda: DCP(heads=-1), ["heads", "-1"]),
        (lambda: DCP(heads=1.0), ["heads", "1.0"]),
        (lambda: DCP(weight=-1.0), ["weight", "-1.0"]),
        *((lambda rows=rows: ThiNet(rows=rows), ["rows", "None for all", repr(rows)]) for rows in (0, -1, 1.5, True)),
        (
            lambda: criterion_from("taylor_f0"),
            ["apoz, ", " bn_scale, ", " dcp, ", " next_layer_taylor, ", " random, ", " taylor_fo, ", " thinet"],
        ),
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


def test_a_class_of_ones_own_takes_no_name_of_ours():
    class L1(criteria.L1):
        """Of a user, who says "l1" elsewhere."""

    assert type(criterion_from("l1")) is criteria.L1 is not L1


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


def test_group_score_combines_members():
    case = residual_case()
    for how, expected in (("mean", lambda a, b: (a + b) / 2), ("sum", torch.add), ("max", torch.maximum)):
        scores = score(case.model, case.graph, L2(combine=how))
        parts = scores.layers["stem"]
        assert list(parts) == ["stem", "conv2"]
        torch.testing.assert_close(scores["stem"], expected(parts["stem"], parts["conv2"]))
