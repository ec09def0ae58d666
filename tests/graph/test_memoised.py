"""Values that a model makes in its first run and finds in the next: the warm run is judged, and results are exact."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import lightning_prune as lp

IMAGES, LARGER = torch.randn(2, 3, 8, 8).double(), torch.randn(3, 3, 12, 10).double()


@functools.lru_cache
def waves(h, w, device):
    ys, xs = torch.arange(h, device=device) / h * 2, torch.arange(w, device=device) / w * 3
    return (torch.sin(ys)[:, None] + torch.cos(xs)[None]).double()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.o = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.cache, self.by_size = None, {}

    def forward(self, x):
        return self.o(self.mix(self.b(self.a(x).relu()).relu()))


class Cached(Net):
    def mix(self, h):
        return h * waves(*h.shape[2:], h.device)


class Attribute(Net):
    def mix(self, h):
        if self.cache is None or self.cache.shape[2:] != h.shape[2:]:
            self.cache = torch.sin(torch.arange(h.shape[2] * h.shape[3]).double()).view(1, 1, *h.shape[2:])
        return h * self.cache


class Wide(Net):
    """A table of the width of the channels: they have to stay."""

    def mix(self, h):
        if (size := tuple(h.shape[2:])) not in self.by_size:
            self.by_size[size] = torch.sin(torch.arange(h.shape[1]).double()).view(1, -1, 1, 1) + torch.ones(
                1, 1, *size
            )
        return h * self.by_size[size]


class Buffer(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", None)

    def mix(self, h):
        if self.scale is None:
            self.scale = torch.sin(torch.arange(h.shape[1]).double()).view(1, -1, 1, 1)
        return h * self.scale


EXPECTED = {Cached: {"a", "b"}, Attribute: {"a", "b"}, Wide: {"a"}}


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("kind", EXPECTED)
def test_a_warm_run_is_judged(kind, warm):
    waves.cache_clear()
    torch.manual_seed(0)
    model = kind().double()
    if warm:
        with torch.no_grad():
            model(IMAGES)
    result = lp.prune(model, IMAGES, selection=lp.LayerRatio(0.5))
    assert {name for name, group in result.plan.groups.items() if group.removed} == EXPECTED[kind]
    assert result.lossless.left == {}
    for images in (IMAGES, LARGER):
        torch.testing.assert_close(result.model(images), result.masked(images), rtol=1e-10, atol=1e-12)


def test_a_buffer_made_in_the_first_run():
    torch.manual_seed(0)
    model = Buffer().double()
    assert not lp.trace(model, IMAGES).group("b").prunable  # there is nothing yet that could be cut
    with torch.no_grad():
        model(IMAGES)
    result = lp.prune(model, IMAGES, selection=lp.LayerRatio(0.5))
    assert result.plan.groups["b"].removed
    for images in (IMAGES, LARGER):
        torch.testing.assert_close(result.model(images), result.masked(images), rtol=1e-10, atol=1e-12)


class OneSize(Net):
    """Keeps the waves of the size that it saw last; a width in its code follows."""

    def __init__(self):
        super().__init__()
        self.width = 8

    def mix(self, h):
        if self.cache is None or self.cache.shape[2:] != h.shape[2:]:
            self.cache = waves.__wrapped__(*h.shape[2:], h.device)[None, None]
        n, _, *size = h.shape
        return h.view(n, self.width, -1).view(n, self.width, *size) * self.cache


def test_a_value_of_the_size_seen_last_is_no_other_path():
    torch.manual_seed(0)
    result = lp.prune(OneSize().double(), IMAGES, selection=lp.LayerRatio(0.5))
    assert result.model.width == 4
    for images in (IMAGES, LARGER):
        torch.testing.assert_close(result.model(images), result.masked(images), rtol=1e-10, atol=1e-12)
