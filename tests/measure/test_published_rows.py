"""Published numbers: FLOPs and parameters of the "GM" rows of Lee et al., Sensors 23(4):2102, 2023, Tables 2 to 4.

The authors' geometric median picks filters at random (their code takes the top-k of an argsort), so independent random
masks per layer and the union at every addition must land on the printed costs: masks, union, reconstruction and
counting tested together against numbers that are not ours. Tables 2 and 3 count a 1000-way head at 32x32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from statistics import fmean

import pytest
import torch
from torch import nn

from lightning_prune import models
from lightning_prune.graph import ChannelGraph, trace
from lightning_prune.measure import count_flops, count_params
from lightning_prune.reconstruction.small_model import reconstruct
from lightning_prune.selection import LayerRatio
from tests.helpers import RandomScores


def fcn_resnet101() -> nn.Module:
    segmentation = pytest.importorskip("torchvision").models.segmentation
    return segmentation.fcn_resnet101(weights=None, weights_backbone=None, aux_loss=True, num_classes=21)


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet34": (lambda: models.resnet34(num_classes=1000), 32),
    "resnet50": (lambda: models.resnet50(num_classes=1000), 32),
    "resnet101": (lambda: models.resnet101(num_classes=1000), 32),
    "fcn_resnet101": (fcn_resnet101, 480),
}
HEADS = {"fcn_resnet101": ("classifier.*", "aux_classifier.*")}  # the backbone alone was pruned

# FLOPs and parameters of the dense models: Tables 2 to 4, truncated or rounded there.
DENSE = {
    "resnet34": (585_316_304, 21_789_992),
    "resnet50": (661_002_192, 25_549_352),
    "resnet101": (1_269_585_872, 44_541_480),
    "fcn_resnet101": (397_867_003_200, 54_314_346),
}

ROWS = [
    ("resnet101", 0.4, 633.40e6, 23.39e6),
    ("resnet101", 0.45, 564.55e6, 21.11e6),
    ("resnet101", 0.7, 264.3e6, 10.76e6),
    ("resnet50", 0.1, 573.54e6, 22.45e6),
    ("resnet50", 0.5, 275.22e6, 11.88e6),
    ("resnet34", 0.5, 286.12e6, 10.73e6),
    ("fcn_resnet101", 0.3, 276.42e9, 37.78e6),
]
SEEDS = range(3)  # one draw of ResNet-34 scatters by 0.5 %


@cache
def traced(name: str) -> tuple[nn.Module, ChannelGraph]:
    """The model without its data (shapes are enough to count) and its channel groups."""
    make, size = MODELS[name]
    model = make().eval()
    graph = trace(model, torch.zeros(1, 3, min(size, 64), min(size, 64)))
    return model.to("meta"), graph


def cost(model: nn.Module, name: str) -> tuple[int, int]:
    size = MODELS[name][1]
    return count_flops(model, torch.empty(1, 3, size, size, device="meta"), "paper"), count_params(model)


@pytest.mark.parametrize("name", DENSE)
def test_dense_models_cost_what_is_published(name: str) -> None:
    assert cost(traced(name)[0], name) == DENSE[name]


@pytest.mark.parametrize(("name", "ratio", "flops", "params"), ROWS)
def test_random_masks_and_their_union_cost_what_is_published(
    name: str, ratio: float, flops: float, params: float
) -> None:
    model, graph = traced(name)
    selection = LayerRatio(ratio, rounding="round", ignore=HEADS.get(name, ()))
    plans = [selection.select(graph, RandomScores(graph, seed), coupling="union") for seed in SEEDS]
    costs = [cost(reconstruct(model, graph, plan), name) for plan in plans]
    assert fmean(c[0] for c in costs) == pytest.approx(flops, rel=0.006)
    assert fmean(c[1] for c in costs) == pytest.approx(params, rel=0.006)


def test_meta_tensors_are_counted_like_real_ones() -> None:
    model = models.resnet18()
    x = torch.zeros(1, 3, 32, 32)
    real = count_flops(model, x, "paper")
    assert count_flops(model.to("meta"), x.to("meta"), "paper") == real
