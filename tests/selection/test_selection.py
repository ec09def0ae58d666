"""Selection: which channels a ratio and its constraints leave."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.criteria.scores import Scores
from lightning_prune.errors import NoEffectWarning, PlanError, ScoreError
from lightning_prune.graph import ChannelGraph, trace
from lightning_prune.plan import Plan
from lightning_prune.schedule import keep_removed
from lightning_prune.selection import Budget, GlobalRatio, LayerRatio
from tests.helpers import RandomScores
from tests.zoo import build, images


def chain(*widths: int) -> ChannelGraph:
    """Linear layers "0", "1", ... of these widths; the last one is the output."""
    sizes = [3, *widths, 2]
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    return trace(nn.Sequential(*layers), torch.zeros(1, 3))


def rising(graph: ChannelGraph) -> dict[str, Tensor]:
    """Channel c scores c: the first ones go first."""
    return {group.name: torch.arange(group.size).double() for group in graph.prunable_groups}


def kept(plan: Plan) -> dict[str, tuple[int, ...]]:
    return {name: group.keep for name, group in plan.groups.items()}


def removed(plan: Plan) -> int:
    return sum(len(group.removed) for group in plan.groups.values())


@pytest.fixture(scope="module")
def residual() -> ChannelGraph:
    return trace(build("Residual"), images())


# Per layer


@pytest.mark.parametrize(
    ("rounding", "ratio", "left"),
    [
        ("round", 0.5, (3, 3, 5)),  # 2.5, 3.5, 4.5 removed: half to even gives 2, 4, 4
        ("floor", 0.5, (3, 4, 5)),
        ("round", 0.25, (4, 5, 7)),  # 1.25, 1.75, 2.25
        ("floor", 0.25, (4, 6, 7)),
    ],
)
def test_layer_ratio_rounds_half_to_even_or_down(rounding, ratio: float, left: tuple[int, ...]) -> None:
    graph = chain(5, 7, 9)
    plan = LayerRatio(ratio, rounding=rounding).select(graph, rising(graph))
    assert tuple(len(keep) for keep in kept(plan).values()) == left


def test_layer_ratio_removes_the_lowest_scores() -> None:
    graph = chain(5)
    scores = {"0": torch.tensor([0.3, -2.0, 5.0, 0.1, 4.0])}
    assert kept(LayerRatio(0.4).select(graph, scores)) == {"0": (0, 2, 4)}


def test_the_first_matching_override_counts() -> None:
    graph = chain(10, 10, 10)
    selection = LayerRatio(0.5, overrides={"1": 0.2, "[12]": 0.7})
    assert {name: len(keep) for name, keep in kept(selection.select(graph, rising(graph))).items()} == {
        "0": 5,
        "1": 8,
        "2": 3,
    }


def test_an_override_of_one_member_holds_for_the_whole_group_under_joint_and_for_itself_under_union(residual) -> None:
    selection = LayerRatio(0.0, overrides={"down.0": 0.5})
    joint = selection.select(residual, RandomScores(residual))
    assert {name for name, group in joint.groups.items() if group.removed} == {"b2.0"}
    union = selection.select(residual, RandomScores(residual), coupling="union")
    assert {k: len(v) for k, v in union.groups["b2.0"].layers.items()} == {"b2.0": 12, "down.0": 6}


def test_ignored_layers_leave_their_group_alone(residual) -> None:
    plan = LayerRatio(0.5, ignore="down.*").select(residual, rising(residual))
    assert set(plan.groups) == {"stem.0", "a1.0", "b1.0"}
    assert removed(plan) == 4 + 4 + 6


@pytest.mark.parametrize(
    "selection",
    [LayerRatio(0.5, ignore=["a1.0", "layer9.*"]), LayerRatio(0.5, overrides={"layer9.*": 0.1}),
     GlobalRatio(0.5, ignore="layer9.*")],
    ids=["ignore", "overrides", "global"],
)  # fmt: skip
def test_a_pattern_that_matches_nothing_is_refused(residual, selection) -> None:
    with pytest.raises(PlanError, match=r"no layer matches 'layer9\.\*'; layers are stem\.0, a2\.0, a1\.0"):
        selection.select(residual, rising(residual))


# Constraints


@pytest.mark.parametrize(("least", "left"), [(1, 1), (4, 4), (4.0, 4), (100, 10), (0.25, 3), (0.5, 5)])
@pytest.mark.parametrize("kind", [LayerRatio, GlobalRatio])
def test_min_channels_is_a_count_or_a_share(kind, least: float, left: int) -> None:
    graph = chain(10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        plan = kind(0.9, min_channels=least).select(graph, rising(graph))
    assert kept(plan)["0"] == tuple(range(10 - left, 10))


def test_min_channels_holds_for_every_layer_under_union_and_for_the_group_under_intersection(residual) -> None:
    scores = RandomScores(residual)
    union = LayerRatio(0.9, min_channels=3).select(residual, scores, coupling="union")
    assert all(len(own) == 3 for group in union.groups.values() for own in group.layers.values())
    both = LayerRatio(0.9, min_channels=3).select(residual, scores, coupling="intersection")
    assert all(len(group.keep) >= 3 for group in both.groups.values())


@pytest.mark.parametrize(("multiple", "left"), [(1, 5), (4, 8), (8, 8), (7, 7), (64, 10)])
def test_round_to_spares_the_best_of_the_condemned(multiple: int, left: int) -> None:
    graph = chain(10)
    scores = {"0": torch.tensor([9.0, 0, 8, 1, 7, 2, 6, 3, 5, 4])}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        plan = LayerRatio(0.5, round_to=multiple).select(graph, scores)
    best = torch.argsort(scores["0"], descending=True)[:left]
    assert kept(plan)["0"] == tuple(sorted(best.tolist()))


@pytest.mark.parametrize("coupling", ["joint", "union", "intersection"])
def test_what_round_to_brings_back_is_kept_by_every_member(residual, coupling) -> None:
    scores = RandomScores(residual)
    plain = LayerRatio(0.75).select(residual, scores, coupling=coupling)
    plan = LayerRatio(0.75, round_to=4).select(residual, scores, coupling=coupling)
    for name, group in plan.groups.items():
        assert len(group.keep) % 4 == 0
        back = set(group.keep) - set(plain.groups[name].keep)
        assert all(back <= set(own) for own in group.layers.values())
    assert plan.groups != plain.groups


# Over the whole network


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.37, 0.5, 0.8])
@pytest.mark.parametrize("over", ["all", "groups", "inner"])
@pytest.mark.parametrize("name", ["Residual", "Dense", "InvertedResidual", "Vgg"])
def test_global_ratio_removes_the_target_within_one_channel(name: str, over, ratio: float) -> None:
    graph = trace(build(name), images())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)  # 0.1 of 4 channels is none
        plan = GlobalRatio(ratio, over=over).select(graph, RandomScores(graph, seed=2))

    def cost(group) -> int:
        return 1 if over == "groups" else sum(layer.index.shape[1] for layer in group.layers)

    groups = [graph.group(planned) for planned in plan.groups]
    target = ratio * sum(cost(group) * group.size for group in groups)
    done = sum(cost(group) * len(plan.groups[group.name].removed) for group in groups)
    assert target - max(map(cost, groups)) < done <= target + 1e-9


def test_global_ratio_takes_the_weakest_wherever_they_are() -> None:
    graph = chain(4, 4)
    scores = {"0": torch.tensor([1.0, 6, 7, 8]), "1": torch.tensor([2.0, 3, 4, 5])}
    assert kept(GlobalRatio(0.5).select(graph, scores)) == {"0": (1, 2, 3), "1": (3,)}


def test_a_channel_of_a_group_counts_for_all_its_filters(residual) -> None:
    # stem.0 and a2.0 (8 channels, 2 filters each), a1.0 (8), b1.0 (12), b2.0 and down.0 (12 channels, 2 each): 60.
    scores = {"stem.0": torch.arange(8.0), "a1.0": 100 + torch.arange(8.0), "b1.0": 200 + torch.arange(12.0)}
    scores["b2.0"] = 300 + torch.arange(12.0)
    filters = GlobalRatio(0.2).select(residual, scores)
    assert {k: len(v.removed) for k, v in filters.groups.items()} == {"stem.0": 6, "a1.0": 0, "b1.0": 0, "b2.0": 0}
    channels = GlobalRatio(0.2, over="groups").select(residual, scores)  # 8 of 40
    assert {k: len(v.removed) for k, v in channels.groups.items()} == {"stem.0": 7, "a1.0": 1, "b1.0": 0, "b2.0": 0}


def test_inner_leaves_what_feeds_an_addition(residual) -> None:
    plan = GlobalRatio(0.5, over="inner").select(residual, rising(residual))
    assert set(plan.groups) == {"a1.0", "b1.0"}
    assert removed(plan) == 10


def test_inner_takes_an_expansion_with_the_depthwise_convolution_behind_it() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    graph = trace(model, torch.randn(1, 3, 8, 8))
    assert removed(GlobalRatio(0.5, over="inner").select(graph, rising(graph))) == 4


def test_inner_without_any_candidate_is_refused() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(x) + self.b(x))

    graph = trace(Sum(), torch.randn(1, 3))
    with pytest.raises(PlanError, match="every prunable layer feeds an addition"):
        GlobalRatio(0.5, over="inner").select(graph, rising(graph))


def test_a_layer_at_its_minimum_does_not_end_the_selection(residual) -> None:
    # The last stem channel is weakest of what is left, costs 2 filters, and may not go: a1.0 pays instead.
    scores = {"stem.0": torch.arange(8.0), "a1.0": 100 + torch.arange(8.0), "b1.0": 200 + torch.arange(12.0)}
    scores["b2.0"] = 300 + torch.arange(12.0)
    plan = GlobalRatio(0.25, min_channels=1).select(residual, scores)  # 15 of 60: 7 x 2 and 1
    assert {k: len(v.removed) for k, v in plan.groups.items()} == {"stem.0": 7, "a1.0": 1, "b1.0": 0, "b2.0": 0}


def test_constraints_end_what_a_ratio_asks_for() -> None:
    graph = chain(10, 10)
    plan = GlobalRatio(0.99, min_channels=3, ignore="1").select(graph, rising(graph))
    assert kept(plan) == {"0": (7, 8, 9)}


def test_what_is_gone_counts_towards_a_higher_ratio() -> None:
    graph = chain(10, 10)
    first = GlobalRatio(0.2).select(graph, rising(graph))
    assert kept(first) == {"0": tuple(range(2, 10)), "1": tuple(range(2, 10))}
    turned = {name: values.flip(0) for name, values in rising(graph).items()}
    turned = Scores(turned, {name: {name: values} for name, values in turned.items()})
    second = GlobalRatio(0.4).select(graph, keep_removed(turned, first))
    assert kept(second) == {"0": tuple(range(2, 8)), "1": tuple(range(2, 8))}


# Coupling


def test_joint_union_and_intersection_of_hand_made_scores() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(x) + self.b(x))

    graph = trace(Sum(), torch.randn(1, 3))
    own = {"a": torch.tensor([1.0, 2, 3, 4]), "b": torch.tensor([4.0, 1, 5, 2])}
    scores = Scores({"a": torch.tensor([5.0, 3, 8, 6])}, {"a": own})
    plans = {c: LayerRatio(0.5).select(graph, scores, coupling=c) for c in ("joint", "union", "intersection")}
    assert {c: p.groups["a"].keep for c, p in plans.items()} == {
        "joint": (2, 3),
        "union": (0, 2, 3),
        "intersection": (2,),
    }
    assert plans["joint"].groups["a"].layers == {"a": (2, 3), "b": (2, 3)}
    for coupling in ("union", "intersection"):
        assert plans[coupling].groups["a"].layers == {"a": (2, 3), "b": (0, 2)}
    assert [plans[c].lossless for c in plans] == [True, True, False]
    everywhere = GlobalRatio(0.5).select(graph, scores, coupling="union")  # 4 of 8, the b of 2 ties with a's
    assert everywhere.groups["a"].layers == {"a": (2, 3), "b": (0, 2)}


@pytest.mark.parametrize("selection", [LayerRatio(0.5), GlobalRatio(0.5)], ids=["layer", "global"])
@pytest.mark.parametrize("coupling", ["joint", "union"])
def test_ties_go_in_order(residual, selection, coupling) -> None:
    scores = RandomScores(residual)
    flat = Scores(
        {name: torch.ones_like(s) for name, s in scores.items()},
        {name: {k: torch.ones_like(s) for k, s in of.items()} for name, of in scores.layers.items()},
    )
    first = selection.select(residual, flat, coupling=coupling)
    assert first == selection.select(residual, flat, coupling=coupling)
    for group in first.groups.values():
        for own in group.layers.values():
            assert own == tuple(range(group.size - len(own), group.size))  # the first channels went


# As an object


@pytest.mark.parametrize(
    "selection",
    [
        LayerRatio(0.25, rounding="floor", overrides={"a": 0.5}, min_channels=0.5, round_to=8, ignore="a.*"),
        GlobalRatio(0.25, over="inner", min_channels=2, ignore=["a", "b"]),
        Budget(flops=0.5, latency_ms=3, convention="paper", repeats=3, min_channels=0.25, round_to=8),
    ],
    ids=lambda selection: type(selection).__name__,
)
def test_a_selection_says_how_to_make_it_again_with_its_own_settings_first(selection) -> None:
    again = eval(repr(selection))
    assert vars(again) == vars(selection)
    assert repr(selection).endswith(f"round_to={selection.round_to}, ignore={selection.ignore})")
    assert hash(again) != hash(selection)  # an object of its own


def test_a_part_of_a_selection_keeps_its_constraints() -> None:
    whole = LayerRatio(0.5, overrides={"a": 0.2}, rounding="floor", round_to=4, ignore="b")
    assert repr(whole.part(0.5)) == repr(
        LayerRatio(0.25, overrides={"a": 0.1}, rounding="floor", round_to=4, ignore="b")
    )
    assert repr(GlobalRatio(0.5, over="groups").part(0.1)) == repr(GlobalRatio(0.05, over="groups"))
    assert repr(Budget(params=0.4, repeats=3).part(0.5)) == repr(Budget(params=0.7, repeats=3))
    assert whole.ratio == 0.5


# Refused


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.0, 2, True, False, float("nan"), float("inf"), "0.5", None])
@pytest.mark.parametrize("kind", [LayerRatio, GlobalRatio])
def test_a_ratio_outside_0_to_1_is_refused(kind, ratio) -> None:
    with pytest.raises(PlanError, match=r"must be in \[0, 1\), got"):
        kind(ratio)
    with pytest.raises(PlanError, match=r"must be in \[0, 1\), got"):
        LayerRatio(0.5, overrides={"a": ratio})


@pytest.mark.parametrize("value", [0, -1, 1.5, True, float("nan"), float("inf"), "4", None])
def test_constraints_that_make_no_sense_are_refused(value) -> None:
    with pytest.raises(PlanError, match="min_channels must be"):
        LayerRatio(0.5, min_channels=value)
    with pytest.raises(PlanError, match="round_to must be"):
        GlobalRatio(0.5, round_to=value)


def test_unknown_settings_are_refused(residual) -> None:
    with pytest.raises(PlanError, match="rounding must be one of round, floor, got 'ceil'"):
        LayerRatio(0.5, rounding="ceil")
    with pytest.raises(PlanError, match="over must be one of all, inner, groups, got 'layers'"):
        GlobalRatio(0.5, over="layers")
    with pytest.raises(PlanError, match="coupling must be one of joint, union, intersection, got 'or'"):
        LayerRatio(0.5).select(residual, rising(residual), coupling="or")


def test_nothing_to_prune_names_the_reasons(residual) -> None:
    graph = trace(nn.Sequential(nn.Linear(3, 2)), torch.zeros(1, 3))
    with pytest.raises(PlanError, match=r"nothing to prune in this model: 0 reaches the model's output"):
        LayerRatio(0.5).select(graph, {})
    with pytest.raises(PlanError, match=r"stem.0 is ignored; .*head.fc reaches the model's output"):
        LayerRatio(0.5, ignore="*").select(residual, rising(residual))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.tensor([1.0, 2, float("nan"), float("nan")]), "group '0': 2 scores are NaN or infinite"),
        (torch.tensor([1.0, 2, float("inf"), 3]), "group '0': 1 scores are NaN or infinite"),
        (torch.arange(5.0), r"group '0': expected 4 scores, got shape \[5\]"),
        (torch.ones(4, 1), r"group '0': expected 4 scores, got shape \[4, 1\]"),
        ([1.0, 2, 3, 4], "group '0': expected a tensor of 4 scores, got list"),
        (None, "no scores for group '0'"),
    ],
)
def test_scores_that_cannot_be_ranked_are_refused(bad, message: str) -> None:
    graph = chain(4, 4)
    scores = rising(graph)
    scores["0"] = bad
    if bad is None:
        del scores["0"]
    with pytest.raises(ScoreError, match=message):
        GlobalRatio(0.5).select(graph, scores)


def test_union_needs_sound_scores_per_layer(residual) -> None:
    good = RandomScores(residual)
    with pytest.raises(ScoreError, match=r"needs scores per layer; use the result of lightning_prune.score"):
        LayerRatio(0.5).select(residual, dict(good), coupling="union")
    layers = {name: dict(of) for name, of in good.layers.items()}
    layers["b2.0"]["down.0"] = torch.full((12,), torch.nan)
    with pytest.raises(ScoreError, match=r"layer 'down.0' of group 'b2.0': 12 scores are NaN"):
        LayerRatio(0.5).select(residual, Scores(good, layers), coupling="union")
    del layers["b2.0"]["down.0"]
    with pytest.raises(ScoreError, match=r"no scores for layer 'down.0' of group 'b2.0'"):
        LayerRatio(0.5).select(residual, Scores(good, layers), coupling="union")
    broken = Scores({**good, "b2.0": torch.full((12,), torch.nan)}, good.layers)  # round_to looks at group scores
    with pytest.raises(ScoreError, match=r"group 'b2.0': 12 scores are NaN"):
        LayerRatio(0.5, round_to=8).select(residual, broken, coupling="union")


@pytest.mark.parametrize(
    "selection",
    [LayerRatio(0.1), LayerRatio(0.5, min_channels=4), GlobalRatio(0.1), LayerRatio(0.5, round_to=4),
     LayerRatio(0.0, overrides={"0": 0.1})],
    ids=["rounds-to-none", "min", "global", "round_to", "override"],
)  # fmt: skip
def test_a_ratio_without_effect_warns(selection) -> None:
    graph = chain(4)
    with pytest.warns(NoEffectWarning, match="removes no channel"):
        assert not selection.select(graph, rising(graph))


@pytest.mark.parametrize("kind", [LayerRatio, GlobalRatio])
def test_ratio_zero_is_silent_and_keeps_everything(kind) -> None:
    graph = chain(4)
    plan = kind(0.0).select(graph, rising(graph))
    assert not plan
    assert kept(plan) == {"0": (0, 1, 2, 3)}
