"""Random models that fold branches into kernels and average weights: exact after pruning, or held."""

from __future__ import annotations

import copy
import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.graph.weight_assigners import MEANS, assert_lossless, traced
from tests.zoo import images, randomise_


class Branch(nn.Module):
    """One of the branches that become a part of a 3x3 kernel."""

    def __init__(self, into: int, out: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        size = 1 if kind == "point" else 3
        self.conv = nn.Conv2d(into, out, size, padding=size // 2, bias=kind != "norm")
        self.norm = nn.BatchNorm2d(out) if kind == "norm" else None
        if kind == "scaled":
            self.scale = nn.Parameter(torch.rand(out) + 0.5)
        elif kind == "low rank":
            self.down, self.up = nn.Parameter(torch.randn(4, into)), nn.Parameter(torch.randn(out, 4))

    def kernel(self) -> tuple[Tensor, Tensor]:
        weight, bias = self.conv.weight, self.conv.bias
        if self.kind == "point":
            weight = F.pad(weight, [1, 1, 1, 1])
        if self.norm is not None:
            factor = self.norm.weight / torch.sqrt(self.norm.running_var + self.norm.eps)
            return weight * factor[:, None, None, None], self.norm.bias - self.norm.running_mean * factor
        if self.kind == "scaled":
            return weight * self.scale.view(-1, 1, 1, 1), bias * self.scale
        if self.kind == "low rank":
            weight = weight + F.pad((self.up @ self.down)[:, :, None, None], [1, 1, 1, 1])
        return weight, bias

    def forward(self, x: Tensor) -> Tensor:
        if self.norm is not None:
            return self.norm(self.conv(x))
        return F.conv2d(x, *self.kernel(), padding=1)


def put(module: nn.Conv2d, how: str, weight: Tensor, bias: Tensor) -> None:
    for name, value in (("weight", weight.detach()), ("bias", bias.detach())):
        old = getattr(module, name)
        if how == "data":
            old.data = value
        elif how == "copy":
            old.copy_(value)
        elif how == "data copy":
            old.data.copy_(value)
        elif how == "parameter":
            setattr(module, name, nn.Parameter(value))
        elif how == "entry":
            module._parameters[name] = nn.Parameter(value)
        elif how == "sum":
            old.data.zero_().add_(value)
        elif how == "lerp":
            old.data.lerp_(value, 1.0)
        elif how == "foreach":
            torch._foreach_copy_([old], [value])
        elif how == "slice":
            old.data[:] = value
    if how == "state dict":
        module.load_state_dict({"weight": weight, "bias": bias})


HOWS = ["data", "copy", "data copy", "parameter", "entry", "sum", "lerp", "foreach", "slice", "state dict"]


class Folded(nn.Module):
    """A sum of branches; one kernel in eval, put there in forward or when the mode changes."""

    def __init__(self, into: int, out: int, rng: random.Random) -> None:
        super().__init__()
        kinds = rng.choices(["plain", "point", "norm", "scaled", "low rank"], k=rng.randint(1, 3))
        self.branches = nn.ModuleList(Branch(into, out, kind) for kind in kinds)
        self.single = nn.Conv2d(into, out, 3, padding=1)
        self.how, self.outside, self.always = rng.choice(HOWS), rng.random() < 0.5, rng.random() < 0.3

    @torch.no_grad()
    def fold(self) -> None:
        kernels = [branch.kernel() for branch in self.branches]
        put(self.single, self.how, sum(w for w, _ in kernels), sum(b for _, b in kernels))

    def train(self, mode: bool = True) -> Folded:
        super().train(mode)
        if self.outside and not mode:
            self.fold()
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.training and (self.outside or not self.always):
            return sum(branch(x) for branch in self.branches)
        if not self.outside:
            self.fold()
        return self.single(x)


class RandomNet(nn.Module):
    """Folded and plain convolutions, some with a shortcut, and perhaps a teacher that follows them in train mode."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        widths = [3, *(rng.choice([6, 8]) for _ in range(rng.randint(2, 3)))]
        self.layers = nn.ModuleList(
            Folded(a, b, rng) if rng.random() < 0.7 else nn.Conv2d(a, b, 3, padding=1)
            for a, b in itertools.pairwise(widths)
        )
        self.shortcuts = [a == b and rng.random() < 0.7 for a, b in itertools.pairwise(widths)]
        self.activation = rng.choice([F.silu, F.relu, torch.sigmoid])
        self.read = nn.Conv2d(widths[-1], 4, 1)
        self.teacher = copy.deepcopy(self.layers).requires_grad_(False) if rng.random() < 0.4 else None
        self.mean = rng.choice(MEANS)

    def run(self, layers: nn.ModuleList, x: Tensor) -> Tensor:
        for layer, shortcut in zip(layers, self.shortcuts, strict=True):
            y = self.activation(layer(x))
            x = y + x if shortcut else y
        return x

    def forward(self, x: Tensor) -> Tensor:
        y = self.run(self.layers, x)
        if self.teacher is not None:
            if self.training:
                with torch.no_grad():
                    self.mean(self.teacher, self.layers)
            y = y + self.run(self.teacher, x)
        return self.read(y)


def check(seed: int) -> None:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = randomise_(RandomNet(rng)).train(rng.random() < 0.5)
    graph = traced(model)
    assert graph.prunable_groups, graph.describe()
    assert_lossless(model, graph, ratio=rng.choice([0.3, 0.6]))


@pytest.mark.parametrize("seed", range(20))
def test_random_folds_and_averages(seed: int) -> None:
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20, 400))
def test_many_random_folds_and_averages(seed: int) -> None:
    check(seed)


def test_the_random_models_have_every_kind() -> None:
    nets = [RandomNet(random.Random(seed)) for seed in range(400)]
    folds = [module for net in nets for module in net.modules() if isinstance(module, Folded)]
    assert {fold.how for fold in folds} == set(HOWS)
    assert {(fold.outside, fold.always) for fold in folds} == {(a, b) for a in (True, False) for b in (True, False)}
    assert len({images().shape, *(len(net.layers) for net in nets)}) == 3
