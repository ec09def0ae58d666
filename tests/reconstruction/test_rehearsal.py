"""What is compared before a smaller model is kept: code that runs only elsewhere is found, and its layers stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.errors import NotReconstructedWarning
from lightning_prune.reconstruction.lossless import distance

Forward = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Two convolutions with code between them that knows the number of channels or their places."""

    def __init__(self, between: Forward) -> None:
        super().__init__()
        self.between = between
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self, F.relu(self.a(x))))


def weighed(net: Net, y: Tensor) -> Tensor:
    """By numbers of each channel's own, though no operator says so."""
    seeded = torch.Generator().manual_seed(0)
    return y * torch.rand(y.shape[1], 1, 1, generator=seeded, dtype=y.dtype).add(1)


def where(asks: Callable[[Net, Tensor], bool]) -> Forward:
    return lambda net, y: weighed(net, y) if asks(net, y) else y


HIDDEN: dict[str, Forward] = {
    "train mode": where(lambda net, y: net.training),
    "odd sides": where(lambda net, y: y.shape[3] % 2 == 1),
    "a single sample": where(lambda net, y: len(y) == 1),
    "a weight that is zero": lambda net, y: y + net.gamma * weighed(net, y.clamp(max=0.2)),
}


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.filterwarnings("ignore:group 'a' keeps its 16 channels")
def test_what_runs_only_elsewhere_is_compared_there(name: str, training: bool) -> None:
    torch.manual_seed(0)
    model = Net(HIDDEN[name]).double()
    result = lp.prune(model, torch.rand(2, 3, 8, 8).double(), criterion="l1", ratio=0.5)
    assert list(result.lossless.left) == ["a"]
    for part in (result.masked, result.model):
        part.train(training)
        nn.init.constant_(part.gamma, 0.7)
    for shape in ((2, 3, 8, 8), (1, 3, 7, 9), (3, 3, 13, 11)):
        x = torch.randn(shape).double()
        torch.testing.assert_close(result.model(x), result.masked(x), rtol=1e-10, atol=1e-12)


def test_a_weight_that_is_zero_costs_no_channel_where_nothing_depends_on_it() -> None:
    model = Net(lambda net, y: y + net.gamma * y.square()).double()
    result = lp.prune(model, torch.rand(2, 3, 8, 8).double(), criterion="l1", ratio=0.5)
    assert not result.lossless.left
    assert result.model.a.out_channels == 8
    assert not result.model.gamma.any()
    assert not result.masked.gamma.any()


def test_the_mark_of_padding_does_not_hide_a_difference() -> None:
    def padded(net: Net, y: Tensor) -> Tensor:
        return weighed(net, y)

    class Padded(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).masked_fill(x[:, :1] == 0, torch.finfo(x.dtype).min)

    x = torch.rand(2, 3, 8, 8).double()
    x[..., -2:] = 0
    with pytest.warns(NotReconstructedWarning, match="differs from the masked one"):
        assert list(lp.prune(Padded(padded).double(), x, criterion="l1", ratio=0.5).lossless.left) == ["a"]


@pytest.mark.parametrize(
    ("one", "other", "relative"),
    [
        ([1.0, 2.0, 4.0], [1.0, 2.0, 4.4], 0.1),
        ([1.0, 2.0, 4.0], [1.1, 2.0, 4.0], 0.025),
        ([1.0, 2.0, -1e4], [1.0, 2.2, -1e4], 2e-5),
        ([1.0, 2.0, -1e30], [1.0, 2.2, -1e30], 0.1),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 0.0], [0.0, 1e-20], float("inf")),
        ([1.0, float("-inf")], [1.0, float("-inf")], 0.0),
        ([1.0, 1.0], [1.0, float("nan")], float("inf")),
    ],
)
def test_relative_errors(one: list[float], other: list[float], relative: float) -> None:
    assert distance([torch.tensor(one)], [torch.tensor(other)])[1] == pytest.approx(relative, rel=1e-6)


BOUNDED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "minimum": lambda y, x: torch.minimum(y, x[:, :1]),
    "clamp": lambda y, x: y.clamp(max=x.amax()),
    "greater": lambda y, x: (y > x[:, :1]).to(y.dtype),
    "where": lambda y, x: torch.where(x[:, :1] > 0, y, -1.0),
    "atan2": lambda y, x: torch.atan2(y, x[:, :1]),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_what_is_zero_beside_positive_numbers_only_is_masked_where_it_is_read(name: str) -> None:
    class Bounded(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(BOUNDED[name](F.relu(self.a(x)), x)) + self.gamma

    result = lp.prune(Bounded(weighed).double(), torch.rand(2, 3, 8, 8).double(), criterion="l1", ratio=0.5)
    assert result.model.a.out_channels == 8
    for x in (torch.rand(3, 3, 9, 11).double(), -torch.rand(3, 3, 9, 11).double()):
        torch.testing.assert_close(result.model(x), result.masked(x), rtol=1e-10, atol=1e-12)


def test_a_slope_that_is_infinite_at_zero_keeps_its_channels() -> None:
    class Deviation(nn.Module):
        def __init__(self, eps: float) -> None:
            super().__init__()
            self.a, self.b, self.eps = nn.Conv1d(3, 8, 3), nn.Linear(8, 2), eps

        def forward(self, x: Tensor) -> Tensor:
            return self.b((F.relu(self.a(x)).var(2) + self.eps).sqrt())

    x = torch.rand(2, 3, 16)
    (group,) = (group for group in lp.trace(Deviation(0.0), x).groups if group.name == "a")
    assert "infinite slope when masked, so that gradients are NaN" in str(group.reason)
    model = Deviation(1e-6)
    graph = lp.trace(model, x)
    lp.mask_(model, graph, lp.LayerRatio(0.5).select(graph, lp.score(model, graph, lp.L1())))
    model(x).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


DRAWING: dict[str, Forward] = {
    "dropout that stays on": lambda net, y: F.dropout(F.dropout2d(y, 0.2), 0.5),
    "noise": lambda net, y: y + torch.randn_like(y) * (0.1 + net.gamma),
    "gumbel": lambda net, y: y + F.gumbel_softmax(y, dim=3),
    "a spike by chance": lambda net, y: torch.bernoulli(y.sigmoid()),
    "a mean and its deviation": lambda net, y: torch.normal(y, y.detach().abs() + 0.1),
    "a normal number": lambda net, y: y * torch.normal(0.0, 1.0, y.shape),
    "an order of samples": lambda net, y: F.dropout(y, 0.5)[torch.randperm(len(y))],
}


@pytest.mark.parametrize("name", DRAWING)
def test_random_numbers_are_no_difference(name: str) -> None:
    torch.manual_seed(0)
    result = lp.prune(Net(DRAWING[name]).double(), torch.rand(2, 3, 8, 8).double(), criterion="l1", ratio=0.5)
    assert result.model.a.out_channels == 8
    assert result.lossless.passed
    assert "forward, all its draws the same" in result.lossless.compared


def test_random_numbers_hide_no_difference() -> None:
    model = Net(lambda net, y: F.dropout(weighed(net, y), 0.5)).double()
    with pytest.warns(NotReconstructedWarning, match="differs from the masked one in forward, all its draws the same"):
        assert list(lp.prune(model, torch.rand(2, 3, 8, 8).double(), ratio=0.5).lossless.left) == ["a"]
