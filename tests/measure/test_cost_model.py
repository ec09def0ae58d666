"""Costs from shapes are those of the reconstructed model, to the last operation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_prune.errors import PlanError
from lightning_prune.graph import trace
from lightning_prune.measure import CostModel, count_flops, count_params
from lightning_prune.plan import Plan
from lightning_prune.reconstruction.small_model import reconstruct
from tests.criteria.helpers import assert_same, snapshot
from tests.helpers import random_plan
from tests.zoo import ZOO, build, images


@pytest.mark.parametrize("coupling", ["joint", "union"])
@pytest.mark.parametrize("name", ZOO)
def test_they_are_exact_for_every_topology(name: str, coupling) -> None:
    model, x = build(name), images(3)
    graph = trace(model, x)
    cost = CostModel(model, graph, x)
    assert (cost.params, cost.macs) == (count_params(model), count_flops(model, x))
    assert cost.of(Plan({})) == (cost.params, cost.macs)
    for seed, ratio in enumerate((0.2, 0.5, 0.8)):
        plan = random_plan(graph, ratio, coupling, seed)
        small = reconstruct(model, graph, plan)
        assert cost.of(plan) == (count_params(small), count_flops(small, x))


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.ConvTranspose2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 2, 1)),
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8, stride=2), nn.Flatten(), nn.Linear(8 * 9, 2)),
        nn.Sequential(nn.Conv2d(3, 8, 1).requires_grad_(False), nn.Conv2d(8, 2, 1)),
    ],
    ids=["transposed", "depthwise-flatten", "frozen"],
)
def test_they_are_exact_for_other_layers(model: nn.Module) -> None:
    x = images(2, size=7).float()
    graph = trace(model, x)
    plan = random_plan(graph, 0.5)
    small = reconstruct(model, graph, plan)
    counted = count_params(small, trainable=False), count_flops(small, x)
    assert CostModel(model, graph, x).of(plan) == counted
    assert plan


def test_what_shapes_do_not_tell_stays_as_an_upper_bound() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(4, 8), nn.Linear(4, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.q(x) @ self.k(x).T

    model, x = Product(), torch.randn(3, 4)
    graph = trace(model, x)
    cost = CostModel(model, graph, x)
    plan = random_plan(graph, 0.5)
    assert cost.macs == count_flops(model, x)
    assert count_flops(reconstruct(model, graph, plan), x) < cost.of(plan)[1] < cost.macs


def test_a_weight_used_twice_counts_for_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.twice, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.twice(self.twice(self.first(x))))

    model, x = Twice(), torch.zeros(3, 4)
    graph = trace(model, x)
    cost = CostModel(model, graph, x)
    assert cost.macs == 32 + 2 * 64 + 16
    half = random_plan(graph, 0.5)
    assert cost.of(half)[1] == count_flops(reconstruct(model, graph, half), x) == 16 + 2 * 16 + 8


def test_the_model_is_left_alone_and_has_to_be_the_traced_one() -> None:
    model = build("Residual").train()
    graph = trace(model, images())
    before = snapshot(model)
    CostModel(model, graph, images())
    assert_same(before, snapshot(model))
    with pytest.raises(PlanError, match="traced on another model"):
        CostModel(build("Vgg"), graph, images())
