"""Every channel of one layer with every channel of another, flattened: those of one may go."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.graph import trace
from tests.zoo import randomise_


class Bilinear(nn.Module):
    """Two maps of the same image, pooled together (Lin et al., 2015)."""

    def __init__(self, first: int = 12, second: int = 6) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, first, 3), nn.BatchNorm2d(first), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(3, second, 3), nn.BatchNorm2d(second), nn.ReLU())
        self.head = nn.Linear(first * second, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.a(x).flatten(2) @ self.b(x).flatten(2).transpose(1, 2)).flatten(1))


class Alone(Bilinear):
    """One map with itself: a channel lies in a row and in a column."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.b = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).flatten(2)
        return self.head((y @ y.transpose(1, 2)).flatten(1))


@pytest.mark.parametrize(("first", "second"), [(12, 6), (6, 12), (8, 8)])
def test_the_more_of_two_may_go(first: int, second: int) -> None:
    model = randomise_(Bilinear(first, second)).double().eval()
    result = lp.prune(model, torch.randn(2, 3, 8, 8).double(), ratio=0.5)
    widths = result.model.a[0].out_channels, result.model.b[0].out_channels
    assert widths == ((first // 2, second) if first >= second else (first, second // 2))
    for training in (False, True):
        for number, size in enumerate(((2, 3, 8, 8), (1, 3, 8, 8), (3, 3, 11, 6))):
            x = torch.randn(size, generator=torch.Generator().manual_seed(number)).double()
            with torch.no_grad():
                want = result.masked.train(training)(x)
                assert torch.allclose(result.model.train(training)(x), want, rtol=1e-10, atol=1e-12)
            assert want.abs().max() > 1e-3


def test_one_map_with_itself_stays() -> None:
    graph = trace(Alone().double(), torch.randn(2, 3, 8, 8).double())
    assert not graph.prunable_groups
    assert "lies across the channels that are read" in str(graph.group("a.0").reason)
