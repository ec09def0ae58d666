"""Budgets: met by the reconstructed model, closely, with the weakest channels, or refused with the nearest that can."""

from __future__ import annotations

import re

import pytest
import torch
import torchvision
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.errors import PlanError, ScoreError, TraceError
from lightning_prune.selection import Budget
from lightning_prune.selection.search import smallest
from tests.criteria.helpers import assert_same, snapshot
from tests.helpers import RandomScores
from tests.zoo import ZOO, build, images, randomise_


def wide(width: int = 64) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 4, 1),
    ).double()


class Attention(nn.Module):
    """Most of its multiply-accumulates are products of two activations."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Conv2d(3, width, 1) for _ in range(3))
        self.out = nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).flatten(2) for layer in (self.q, self.k, self.v))
        mixed = v @ (q.transpose(1, 2) @ k).softmax(1)
        return self.out(mixed.unsqueeze(-1))


def shares(model: nn.Module, small: nn.Module, x: Tensor, convention: str = "macs") -> dict[str, float]:
    return {
        "flops": lp.measure.count_flops(small, x, convention) / lp.measure.count_flops(model, x, convention),
        "params": lp.measure.count_params(small, trainable=False) / lp.measure.count_params(model, trainable=False),
    }


def chosen(model: nn.Module, x: Tensor, selection: Budget, **options) -> tuple[lp.Plan, nn.Module]:
    graph = lp.trace(model, x)
    plan = selection.select(graph, RandomScores(graph, 5), model=model, example_inputs=x, **options)
    return plan, lp.reconstruct(model, graph, plan, example_inputs=x)


# What is reached


@pytest.mark.parametrize("coupling", ["joint", "union"])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.3, 0.1])
@pytest.mark.parametrize("what", ["flops", "params"])
def test_a_share_is_met_within_one_percent(what: str, share: float, coupling) -> None:
    model, x = wide(), images()
    plan, small = chosen(model, x, Budget(**{what: share}), coupling=coupling)
    assert 0.99 * share <= shares(model, small, x)[what] <= share
    assert plan.lossless


@pytest.mark.parametrize("what", ["flops", "params"])
@pytest.mark.parametrize(
    ("name", "multiple"),
    [*((name, 1) for name in ZOO), *((name, 4) for name in ("Residual", "PreActivation", "InvertedResidual", "Vgg"))],
)
def test_where_channels_are_too_coarse_none_of_the_removed_would_fit(name: str, what: str, multiple: int) -> None:
    model, x = build(name), images()
    graph = lp.trace(model, x)
    scores = RandomScores(graph)
    plan = Budget(**{what: 0.6}, round_to=multiple).select(graph, scores, model=model, example_inputs=x)
    reached = shares(model, lp.reconstruct(model, graph, plan), x)[what]
    assert reached <= 0.6
    if reached >= 0.99 * 0.6:
        return
    for name, group in plan.groups.items():
        best = sorted(group.removed, key=lambda channel, name=name: -scores[name][channel])[:multiple]
        if best:
            fuller = lp.plan.GroupPlan(group.size, tuple(sorted((*group.keep, *best))))
            small = lp.reconstruct(model, graph, lp.Plan({**plan.groups, name: fuller}))
            assert shares(model, small, x)[what] > 0.6


def test_the_weakest_go() -> None:
    model, x = wide(), images()
    graph = lp.trace(model, x)
    scores = RandomScores(graph)
    plan = Budget(params=0.5).select(graph, scores, model=model, example_inputs=x)
    best_gone = max(float(scores[n][list(g.removed)].max()) for n, g in plan.groups.items() if g.removed)
    worst_kept = min(float(scores[n][list(g.keep)].min()) for n, g in plan.groups.items())
    assert best_gone <= worst_kept
    tied = {name: torch.zeros(64) for name in scores}
    plan = Budget(params=0.5).select(graph, tied, model=model, example_inputs=x)  # the order of the network
    assert [len(plan.groups[name].removed) > 0 for name in plan.groups] == [True, True, False, False]


def test_several_budgets_hold_at_once_and_one_binds() -> None:
    model, x = build("Vgg"), images()
    alone = shares(model, chosen(model, x, Budget(flops=0.5))[1], x)
    both = shares(model, chosen(model, x, Budget(flops=0.5, params=alone["params"] * 0.7))[1], x)
    assert both["flops"] <= 0.5
    assert both["params"] <= alone["params"] * 0.7
    same = shares(model, chosen(model, x, Budget(flops=0.5, params=0.99))[1], x)
    assert same == alone


@pytest.mark.parametrize("convention", ["flops2", "ptflops", "paper"])
def test_other_conventions_are_counted_on_the_reconstructed_model(convention: str) -> None:
    model, x = wide(), images()
    _, small = chosen(model, x, Budget(flops=0.4, convention=convention))
    assert 0.99 * 0.4 <= shares(model, small, x, convention)["flops"] <= 0.4


def test_products_that_shapes_do_not_tell_of_are_counted_on_the_reconstructed_model() -> None:
    model, x = Attention(128).double(), images()
    _, small = chosen(model, x, Budget(flops=0.4))
    assert 0.99 * 0.4 <= shares(model, small, x)["flops"] <= 0.4


def test_a_group_that_the_code_needs_whole_pays_with_others() -> None:
    class Picky(nn.Module):
        """Does not run with fewer than three channels, which tracing does not try."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 64, 1), nn.Linear(64, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            if x.shape[1] < 3:
                raise ValueError("three channels at least")
            return self.c(self.b(x).mean((2, 3)))

    model, x = randomise_(Picky()).eval(), images()
    graph = lp.trace(model, x)
    scores = {"a": torch.zeros(6), "b": torch.arange(1.0, 65.0)}  # a goes first
    plan = Budget(params=0.5).select(graph, scores, model=model, example_inputs=x)
    with pytest.warns(lp.errors.NotReconstructedWarning, match="group 'a' keeps its 6 channels"):
        small = lp.reconstruct(model, graph, plan, example_inputs=x)
    assert 0.97 * 0.5 <= shares(model, small, x)["params"] <= 0.5


# Constraints


@pytest.mark.parametrize("coupling", ["joint", "union"])
def test_rounding_to_multiples_is_lossless_and_keeps_the_best_of_the_condemned(coupling) -> None:
    model, x = wide(), images()
    graph = lp.trace(model, x)
    scores = RandomScores(graph, 5)
    plan = Budget(flops=0.5, round_to=8).select(graph, scores, model=model, example_inputs=x, coupling=coupling)
    small = lp.reconstruct(model, graph, plan, example_inputs=x)
    assert lp.check_lossless(lp.reconstruct(model, graph, lp.Plan({})), small, x).passed is False  # it did prune
    assert 0.4 < shares(model, small, x)["flops"] <= 0.5
    for name, group in plan.groups.items():
        assert len(group.keep) % 8 == 0
        assert set(group.keep) == set(scores[name].argsort(descending=True)[: len(group.keep)].tolist())
    assert plan


def test_min_channels_and_ignore_hold() -> None:
    model, x = wide(), images()
    plan, small = chosen(model, x, Budget(flops=0.4, min_channels=38))
    assert all(len(group.keep) >= 38 for group in plan.groups.values())
    assert 0.98 * 0.4 <= shares(model, small, x)["flops"] <= 0.4
    plan, small = chosen(model, x, Budget(flops=0.4, ignore="2"))
    assert set(plan.groups) == {"0", "5", "7"}
    assert 0.99 * 0.4 <= shares(model, small, x)["flops"] <= 0.4


# What cannot be reached


@pytest.mark.parametrize(
    "asked",
    [
        Budget(flops=0.05, min_channels=0.5),
        Budget(params=0.01, round_to=32),
        Budget(flops=0.5, params=0.2, ignore="2", min_channels=40),
        Budget(flops=0.02, convention="paper", min_channels=16),
    ],
    ids=repr,
)
def test_an_impossible_budget_is_refused_and_the_nearest_named(asked: Budget) -> None:
    model, x = wide(), images()
    with pytest.raises(PlanError, match=r"cannot be met.*CANNOT be met.*The nearest that can be met is") as error:
        chosen(model, x, asked)
    named = re.search(r"can be met is Budget\((.*)\)", str(error.value)).group(1)
    settings = {key: float(value) for key, value in (part.split("=") for part in named.split(", "))}
    rest = {key: getattr(asked, key) for key in ("convention", "min_channels", "round_to", "ignore")}
    _, small = chosen(model, x, Budget(**settings, **rest))
    reached = shares(model, small, x, asked.convention)
    assert all(reached[name] <= share for name, share in settings.items())
    harder = {name: share - 0.002 if share != getattr(asked, name) else share for name, share in settings.items()}
    with pytest.raises(PlanError, match="cannot be met"):
        chosen(model, x, Budget(**harder, **rest))


def test_whether_it_can_be_met_is_told_before_anything_is_done() -> None:
    model, x = wide(), images()
    graph = lp.trace(model, x)
    scores = RandomScores(graph)
    before = snapshot(model)
    yes = Budget(flops=0.5).reach(graph, scores, model=model, example_inputs=x)
    no = Budget(flops=0.1, params=0.9, min_channels=32).reach(graph, scores, model=model, example_inputs=x)
    assert_same(before, snapshot(model))
    assert yes.met
    assert yes.nearest == {"flops": 0.5}
    assert str(yes).endswith("remain: can be met")
    assert not no.met
    assert no.least["flops"] == 64 * (27 * 32 + 3 * 9 * 32 * 32 + 32 * 4)
    assert no.nearest == {"flops": 0.255, "params": 0.9}
    assert [line.split(" remain: ")[1] for line in str(no).splitlines()] == ["CANNOT be met", "can be met"]


@pytest.mark.parametrize("last", range(6))
def test_the_search_finds_the_smallest_count_from_any_guess(last: int) -> None:
    for guess in range(last + 1):
        for first in range(last + 2):
            asked: list[int] = []

            def verdict(count: int, first: int = first, asked: list[int] = asked) -> str:
                asked.append(count)
                return "fits" if count >= first else "too much"

            assert smallest(verdict, last, guess) == (first if first <= last else None)
            assert len(asked) == len(set(asked))


def test_the_search_takes_a_logarithm_of_steps() -> None:
    asked: list[int] = []
    for guess in (0, 5_000, 10_000):
        assert smallest(lambda n: asked.append(n) or ("fits" if n >= 4_321 else "too much"), 10_000, guess) == 4_321
    assert len(asked) <= 3 * 30


def test_the_search_ends_at_the_first_that_is_enough() -> None:
    near = {count: "enough" if count < 60 else "fits" for count in range(40, 101)}
    assert 40 < smallest(lambda n: near.get(n, "too much"), 100, 90) < 60


# Refused


@pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, True, "0.5", float("nan")])
def test_shares_outside_0_to_1_are_refused(value) -> None:
    for name in ("flops", "params"):
        with pytest.raises(PlanError, match=rf"{name} is the share .* that may remain and must be in \(0, 1\)"):
            Budget(**{name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "a budget needs at least one of flops=, params=, latency_ms="),
        ({"latency_ms": 0}, "latency_ms must be a positive number"),
        ({"latency_ms": float("inf")}, "latency_ms must be a positive number"),
        ({"latency_ms": "20"}, "latency_ms must be a positive number"),
        ({"flops": 0.5, "convention": "gflops"}, "convention must be one of macs, flops2, ptflops, paper"),
        ({"flops": 0.5, "repeats": 0}, "repeats must be an integer >= 1"),
        ({"flops": 0.5, "round_to": 0}, "round_to must be"),
    ],
)
def test_budgets_that_make_no_sense_are_refused(settings, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Budget(**settings)


def test_it_needs_the_traced_model_and_sound_scores() -> None:
    model, x = wide(8), images()
    graph = lp.trace(model, x)
    scores = RandomScores(graph)
    with pytest.raises(PlanError, match=r"counts the pruned model: pass select\(..., model=..., example_inputs=...\)"):
        Budget(flops=0.5).select(graph, scores)
    with pytest.raises(PlanError, match="traced on another model"):
        Budget(flops=0.5).select(graph, scores, model=wide(9), example_inputs=x)
    with pytest.raises(TraceError, match="does not run"):
        Budget(flops=0.5).select(graph, scores, model=model, example_inputs=x[:, :2])
    with pytest.raises(ScoreError, match="no scores for group '2'"):
        Budget(flops=0.5).select(graph, {"0": scores["0"]}, model=model, example_inputs=x)


# With the rest of the package


@pytest.mark.parametrize("coupling", ["joint", "union"])
def test_prune_takes_a_budget_and_leaves_the_model_alone(coupling) -> None:
    model, x = wide().train(), images()
    before = snapshot(model)
    result = lp.prune(model, x, criterion="l2", selection=Budget(flops=0.5), coupling=coupling)
    assert_same(before, snapshot(model))
    assert 0.495 <= result.after.macs / result.before.macs <= 0.5
    assert result.lossless.passed


def test_one_scoring_pass_serves_many_budgets() -> None:
    model, x = wide(), images()
    first = lp.prune(model, x, criterion="l1", selection=Budget(flops=0.5))
    for share in (0.5, 0.3):
        result = lp.prune(model, x, criterion="jre", selection=Budget(flops=share), scores=first.scores)
        assert result.after.macs <= share * result.before.macs
    assert lp.prune(model, x, selection=Budget(flops=0.5), scores=first.scores).plan == first.plan
    with pytest.raises(ScoreError, match="another model"):
        lp.prune(wide(8), x, scores=first.scores)


# Torchvision's models, at full size


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", pytest.param("densenet121", marks=pytest.mark.slow)])
def test_torchvision_models_meet_their_budget(name: str) -> None:
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None).eval()
    x = torch.randn(1, 3, 224, 224)
    graph = lp.trace(model, x)
    scores = lp.score(model, graph, "l1")
    for asked in (Budget(flops=0.5), Budget(flops=0.3), Budget(params=0.5), Budget(params=0.3)):
        plan = asked.select(graph, scores, model=model, example_inputs=x)
        reached = shares(model, lp.reconstruct(model, graph, plan), x)
        what = "flops" if asked.flops else "params"
        assert 0.99 * getattr(asked, what) <= reached[what] <= getattr(asked, what)


class Stages(nn.Module):
    """Two convolutions; a channel of the first costs 16 times as many operations as one of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.dear, self.cheap = nn.Conv2d(4, 16, 1, bias=False), nn.Conv2d(16, 16, 4, 4, groups=16, bias=False)
        self.late, self.head = nn.Conv2d(16, 16, 1, bias=False), nn.Conv2d(16, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.late(self.cheap(self.dear(x))))


def kept_by(order: str, dear: Tensor, late: Tensor, **budget: float) -> tuple[int, int]:
    model, inputs = Stages(), torch.randn(1, 4, 8, 8)
    graph = lp.trace(model, inputs)
    plan = Budget(order=order, **budget).select(graph, {"dear": dear, "late": late}, model=model, example_inputs=inputs)
    before, after = (lp.measure(of, inputs) for of in (model, lp.reconstruct(model, graph, plan)))
    assert 0.9 * budget.get("flops", 0.0) <= after.macs / before.macs <= budget.get("flops", 1.0)
    assert after.params / before.params <= budget.get("params", 1.0)
    left = {name: 16 - len(group.removed) for name, group in plan.groups.items()}
    return left.get("dear", 16), left.get("late", 16)


def test_a_budget_takes_the_same_share_of_every_layer() -> None:
    model, inputs = wide(), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    graph = lp.trace(model, inputs)
    scores = {group.name: torch.rand(group.size) * 10.0**place for place, group in enumerate(graph.prunable_groups)}
    for order, spread in (("share", 2), ("score", 40)):  # scores of different layers are not comparable
        plan = Budget(order=order, flops=0.5).select(graph, scores, model=model, example_inputs=inputs)
        kept = [len(plan.groups[name].keep) if name in plan.groups else 64 for name in scores]
        assert (max(kept) - min(kept) <= spread) == (order == "share")
        for name, group in plan.groups.items():
            assert sorted(scores[name].argsort(descending=True)[: len(group.keep)].tolist()) == list(group.keep)


def test_a_budget_takes_the_lowest_scores_for_their_cost() -> None:
    up = torch.arange(1.0, 17)
    dear, late = kept_by("score_per_cost", 3 * up, up, flops=0.5)
    assert (dear, late) < kept_by("score", 3 * up, up, flops=0.5)
    harmful = torch.cat([-up[:8], up[8:]])  # they go first, whatever they cost
    assert kept_by("score_per_cost", 3 * up, harmful, flops=0.9)[1] <= 8
    assert kept_by("score_per_cost", up, 4 * up, params=0.9)[0] < 16  # of parameters both cost nearly the same


def test_orders_without_meaning_are_refused() -> None:
    with pytest.raises(PlanError, match="order must be one of score, score_per_cost, share"):
        Budget(flops=0.5, order="cost")
