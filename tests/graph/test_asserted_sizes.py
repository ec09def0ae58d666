"""Widths that code only compares: the attribute follows, or the channels stay."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.errors import UnreachedWarning
from lightning_prune.reconstruction.lossless import check_lossless
from tests.helpers import random_plan
from tests.zoo import images, randomise_

WIDTH = 8


def conv(inputs: int = WIDTH, outputs: int = WIDTH) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def pruned(middle: nn.Module, width: int = WIDTH) -> tuple[lp.ChannelGraph, nn.Module]:
    """Graph and reconstructed model, compared with the masked one at two sizes."""
    model = nn.Sequential(conv(3, WIDTH), nn.SiLU(), middle, nn.SiLU(), nn.Conv2d(width, 3, 1))
    model = randomise_(model).double().eval()
    graph = lp.trace(model, images())
    plan = random_plan(graph, 0.5)
    small, masked = lp.reconstruct(model, graph, plan), copy.deepcopy(model)
    lp.mask_(masked, graph, plan)
    for x in (images(), images(3, size=12, seed=4)):
        assert check_lossless(masked, small, x).passed
    return graph, small


class Asserts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.channels, self.conv = WIDTH, conv()

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.channels
        return self.conv(x)


class Raises(Asserts):
    def forward(self, x: Tensor) -> Tensor:
        if x.size(1) != self.channels:
            raise ValueError(f"expected {self.channels} channels")
        return self.conv(x)


class Checks(Asserts):
    def forward(self, x: Tensor) -> Tensor:
        torch._check(x.shape[1] == self.channels, lambda: "width")
        return self.conv(x)


class Views(Asserts):
    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        return self.conv(x.view(n, self.channels, -1).view(n, self.channels, h, w))


class Listed(nn.Module):
    """The width is one of a tuple; another number in it is equal by chance to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.shape, self.conv = (WIDTH, 5), conv(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.shape[0]
        x = self.conv(x)
        assert x.shape[1] == self.shape[1]
        return x


class Inner(nn.Module):
    """Checks what lies between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.middle, self.first, self.second = 6, conv(WIDTH, 6), conv(6, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        assert x.shape[1] == self.middle
        return self.second(x)


class Both(Asserts):
    """One number for what enters and what leaves: they go together."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.channels
        x = self.conv(x)
        assert x.shape[1] == self.channels
        return x


class Told(nn.Module):
    """Knows no width by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def forward(self, x: Tensor, channels: int) -> Tensor:
        assert x.shape[1] == channels
        return self.conv(x)


class Caller(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.channels, self.told = WIDTH, Told()

    def forward(self, x: Tensor) -> Tensor:
        return self.told(x, self.channels)


class Parent(nn.Module):
    """Checks what its child makes, which has the same name for its own width."""

    def __init__(self) -> None:
        super().__init__()
        self.out_channels, self.child = WIDTH, Asserts()

    def forward(self, x: Tensor) -> Tensor:
        x = self.child(x)
        assert x.shape[1] == self.out_channels
        return x


@pytest.mark.parametrize("middle", [Asserts, Raises, Checks, Views, Inner, Both, Caller, Parent])
def test_the_attribute_follows(middle: Callable[[], nn.Module]) -> None:
    graph, small = pruned(middle())
    assert graph.group("0").prunable
    assert small[0].out_channels == WIDTH // 2


def test_a_number_in_a_tuple_follows() -> None:
    _, small = pruned(Listed(), 5)
    assert small[2].shape == (4, 3)


def test_what_enters_and_leaves_is_tied_only_where_both_are_compared() -> None:
    assert [group.name for group in pruned(Asserts())[0].prunable_groups] == ["0", "2.conv"]
    assert [group.name for group in pruned(Both())[0].prunable_groups] == ["0"]


class Chance(nn.Module):
    """Compares with a number that also is something else."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.conv = WIDTH, conv()

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.heads
        return self.conv(x) / self.heads


class Written(Asserts):
    """Compares with a number that no attribute holds."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 8
        return self.conv(x)


class Unrelated(nn.Module):
    """An attribute of that value that nothing compares."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.conv = WIDTH, conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * self.scale


@pytest.mark.parametrize("middle", [Chance, Written])
def test_channels_stay_where_the_number_means_something_else(middle: Callable[[], nn.Module]) -> None:
    graph, _ = pruned(middle())
    assert "2" in str(graph.group("0").reason)
    assert graph.group("2.conv").prunable


def test_an_attribute_that_nothing_compares_is_left_alone() -> None:
    graph, small = pruned(Unrelated())
    assert graph.group("0").prunable
    assert small[2].scale == WIDTH


def test_an_unreached_branch_of_the_same_type_follows_too() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.easy, self.hard, self.deep = Asserts(), Asserts(), False

        def forward(self, x: Tensor) -> Tensor:
            return (self.hard if self.deep else self.easy)(x)

    with pytest.warns(UnreachedWarning):
        graph, small = pruned(Branches())
    small[2].deep = True
    assert graph.group("0").prunable
    assert small(images()).shape == (2, 3, 8, 8)
