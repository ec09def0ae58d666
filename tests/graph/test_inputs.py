"""Models that change their inputs in place: everybody's stay as they are."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import lightning_prune as lp
from tests.zoo import randomise_


class Scaling(nn.Module):
    """Brings its images to its range in place, as some super-resolution code does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        images *= 255.0
        return self.last(self.first(images).relu()) / 255.0


def test_inputs_that_the_model_changes_stay_and_both_models_see_the_same() -> None:
    model = randomise_(Scaling()).double().eval()
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    before = images.clone()
    graph = lp.trace(model, images)
    assert torch.equal(images, before)
    plan = lp.LayerRatio(0.5).select(graph, lp.score(model, graph, "l1"))
    small, masked = lp.reconstruct(model, graph, plan), copy.deepcopy(model)
    lp.mask_(masked, graph, plan)
    assert lp.check_lossless(masked, small, images).passed
    assert torch.equal(images, before)
    assert not lp.check_lossless(model, small, images).passed
    lp.prune(model, images, ratio=0.5)
    assert torch.equal(images, before)
