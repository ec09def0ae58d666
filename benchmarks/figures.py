"""The figures behind two claims: losslessness in float64, and the published costs of random masks with union.

Run from the repository's root: ``python -m benchmarks.figures``.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

import torch
import torchvision
from torch import nn

import lightning_prune as lp
from lightning_prune import models
from tests.helpers import RandomScores, random_plan
from tests.measure.test_published_rows import HEADS, ROWS, SEEDS, cost, traced
from tests.zoo import randomise_

LOSSLESS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": models.resnet18,
    "resnet34": models.resnet34,
    "resnet50": models.resnet50,
    "resnet101": models.resnet101,
    "vgg16_bn": models.vgg16_bn,
    **{
        name: lambda name=name: torchvision.models.get_model(name, weights=None)  # type: ignore[misc]
        for name in ("densenet121", "mobilenet_v2", "mobilenet_v3_small", "resnext50_32x4d", "efficientnet_b0")
    },
}


def losslessness() -> None:
    """Masked against reconstructed, half of every layer removed at random, every batch norm randomised."""
    print("largest relative error, float64     joint    union")
    for name, make in LOSSLESS.items():
        model = randomise_(make()).eval()
        side = 32 if name == "vgg16_bn" else 64
        images = torch.randn(2, 3, side, side, dtype=torch.float64)
        graph = lp.trace(model, images[:1])
        errors = []
        for coupling in ("joint", "union"):
            plan = random_plan(graph, 0.5, coupling)
            small = lp.reconstruct(model, graph, plan)
            with lp.mask_(model, graph, plan):
                errors.append(lp.check_lossless(model, small, images).max_rel_error)
        print(f"{name:<33} {errors[0]:8.1e} {errors[1]:8.1e}")


def published_rows() -> None:
    """FLOPs and parameters of the seven GM rows of Lee et al. 2023, mean of three draws."""
    print("\nmodel, ratio            FLOPs (M)  published   diff   params (M)  published   diff")
    for name, ratio, flops, params in ROWS:
        model, graph = traced(name)
        selection = lp.LayerRatio(ratio, rounding="round", ignore=HEADS.get(name, ()))
        plans = [selection.select(graph, RandomScores(graph, seed), coupling="union") for seed in SEEDS]
        costs = [cost(lp.reconstruct(model, graph, plan), name) for plan in plans]
        found = fmean(c[0] for c in costs), fmean(c[1] for c in costs)
        print(
            f"{name:<17} {ratio:<4} {found[0] / 1e6:11.2f} {flops / 1e6:10.2f} {found[0] / flops - 1:+7.2%}"
            f" {found[1] / 1e6:11.3f} {params / 1e6:10.2f} {found[1] / params - 1:+7.2%}"
        )


if __name__ == "__main__":
    losslessness()
    published_rows()
