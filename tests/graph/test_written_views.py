"""Values written into a part of a tensor: the others who have the memory learn of it, and what is exact goes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.graph import trace
from tests.zoo import randomise_

SIZES = ((2, 8, 8), (1, 8, 8), (3, 9, 12), (5, 12, 7))


class Written(nn.Module):
    """Sixteen channels, something done with them, a reader."""

    def __init__(self, channels: int = 16, value: float = 0.0) -> None:
        super().__init__()
        self.a, self.norm, self.c = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Conv2d(channels, 4, 3)
        self.v = nn.Parameter(torch.tensor(value))

    def write(self, y: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.write(self.norm(self.a(x)).tanh(), x))


class Number(Written):
    def write(self, y, x):
        y = y.clone()
        y[:, :, 0] = self.v
        return y


class NumberFirst(Written):
    """A new tensor gets the number before it gets the channels."""

    def write(self, y, x):
        new = torch.empty_like(y)
        new[:, :, :1].fill_(self.v)
        new[:, :, 1:] = y[:, :, 1:]
        return new


class NumberInOne(Written):
    """A view that was taken before, of a tensor whose other end gets the number."""

    def write(self, y, x):
        y = y.clone()
        rows = y[:, :, :3]
        y[:, :, 2:4] = self.v
        return F.pad(rows, (0, 0, 0, 5))


class NumberAfterZeros(Written):
    """A view is cleared, then all of it gets the number."""

    def write(self, y, x):
        new = torch.empty_like(y)
        rows = new[:, :, :2]
        new.zero_()
        rows.fill_(self.v)
        return y + new


class Randomly(Written):
    """Positions of the batch get the number, by their numbers."""

    def write(self, y, x):
        y = y.clone()
        y[torch.tensor([0])] = self.v
        return y


NUMBERS = (Number, NumberFirst, NumberInOne, NumberAfterZeros, Randomly)


def fits(result: lp.PruneResult, model: nn.Module) -> None:
    """The small model is one, and computes what the masked one does at every size, in both modes."""
    assert result.lossless.passed
    assert sum(p.numel() for p in result.model.parameters()) < sum(p.numel() for p in model.parameters())
    for training in (False, True):
        for number, (batch, height, width) in enumerate(SIZES):
            x = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(number)).double()
            with torch.no_grad():
                want = result.masked.train(training)(x)
                assert torch.allclose(result.model.train(training)(x), want, rtol=1e-10, atol=1e-12)
            assert want.abs().max() > 1e-3


def pruned(model: nn.Module) -> lp.PruneResult:
    return lp.prune(model.double().eval(), torch.randn(2, 3, 8, 8).double(), ratio=0.5)


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("kind", NUMBERS)
def test_a_number_that_is_zero_when_pruned_and_trained_later(kind: type[Written], value: float) -> None:
    model = randomise_(kind())
    with torch.no_grad():
        model.v.fill_(value)
    result = pruned(model)
    fits(result, model)
    for one in (result.masked, result.model):
        with torch.no_grad():
            one.v.add_(1.5)
    fits(result, model)
    assert not result.lossless.left


class Cleared(Number):
    def write(self, y, x):
        y = y.clone()
        y[:, :, 0].zero_()
        return y * y.sum(1, keepdim=True)  # no weight of which could mask a number


def test_zeros_written_into_a_part_leave_its_channels_zero() -> None:
    model = randomise_(Cleared())
    fits(pruned(model), model)


class Volume(Written):
    """A cost volume: zeros of twice as many channels as come."""

    def __init__(self) -> None:
        super().__init__(32)

    def write(self, y, x):
        volume = y.new_zeros(len(y), 2 * y.shape[1], *y.shape[2:])
        volume[:, : y.shape[1]] = y
        volume[:, y.shape[1] :, :, 1:] = y[..., :-1]
        return volume


class Disparities(Written):
    """The same with a dimension for every shift."""

    def __init__(self) -> None:
        super().__init__(32)
        self.mix = nn.Conv3d(32, 6, 1)
        self.c = nn.Conv2d(6, 4, 3)

    def write(self, y, x):
        other = self.norm(self.a(x.flip(3))).tanh()
        volume = torch.zeros(len(y), 2 * y.shape[1], 3, *y.shape[2:], dtype=y.dtype)
        for shift in range(3):
            if shift:
                volume[:, : y.shape[1], shift, :, shift:] = y[..., shift:]
                volume[:, y.shape[1] :, shift, :, shift:] = other[..., :-shift]
            else:
                volume[:, : y.shape[1], shift] = y
                volume[:, y.shape[1] :, shift] = other
        return self.mix(volume).sum(2)


class Halves(Written):
    """A part of the channels is worked on in place, as many as the input says."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.part = nn.Conv2d(3, 8, 3, padding=1), 8

    def write(self, y, x):
        y = y.clone()
        y[:, : y.shape[1] // 2] += self.b(x)
        return y


class Attribute(Halves):
    """As many as an attribute says."""

    def write(self, y, x):
        y = y.clone()
        y[:, : self.part] += self.b(x)
        y[:, : self.part].relu_()
        return y


class Filled(Halves):
    """Both halves of a new tensor that holds ones between them."""

    def write(self, y, x):
        new = torch.ones_like(y)
        new[:, : y.shape[1] // 2, 1:] = self.b(x)[:, :, 1:]
        new[:, y.shape[1] // 2 :, 1:] = y[:, : y.shape[1] // 2, 1:]
        return new


@pytest.mark.parametrize("kind", [Volume, Disparities, Halves, Attribute, Filled])
def test_channels_written_beside_others(kind: type[Written]) -> None:
    model = randomise_(kind())
    result = pruned(model)
    fits(result, model)
    assert result.model.a.out_channels < 16


class Literal(Halves):
    def write(self, y, x):
        y = y.clone()
        y[:, :8] += self.b(x)
        return y


class Unwritten(Halves):
    """Zeros of a number of its own, half of which nothing ever writes."""

    def write(self, y, x):
        new = y.new_zeros(len(y), 32, *y.shape[2:])
        new[:, : y.shape[1]] = y
        return new[:, :16] + new[:, 16:]


@pytest.mark.parametrize("kind", [Literal, Unwritten])
def test_numbers_in_the_code_hold_channels(kind: type[Written]) -> None:
    graph = trace(kind().double(), torch.randn(2, 3, 8, 8).double())
    assert not graph.prunable_groups
    assert any("fixed in the Python code" in str(group.reason) for group in graph.groups)
