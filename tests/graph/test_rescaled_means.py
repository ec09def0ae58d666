"""Means over channels: exact where the module's eps and weight can make up for fewer, else the channels stay."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.graph import ChannelGraph
from lightning_prune.reconstruction.lossless import check_lossless
from tests.graph.norms_over_channels import EXACT, STAY, InFloat32, Normalised, NormalisedByShape, OnePlus, Rms
from tests.helpers import random_plan
from tests.zoo import randomise_

WIDTH = 12
Norm = Callable[[int], nn.Module]


class Tokens(nn.Module):
    """(batch, steps, 5): a residual width under a norm."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(5, WIDTH), norm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 9), nn.GELU(), nn.Linear(9, WIDTH))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.mlp(self.norm(x)))


def tokens(batch: int = 2, steps: int = 6, seed: int = 1, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, steps, 5, generator=generator, dtype=torch.float64) * scale


def made(model: nn.Module) -> nn.Module:
    return randomise_(model).double().eval()


def pruned(model: nn.Module, graph: ChannelGraph, ratio: float, seed: int = 0) -> nn.Module:
    """The reconstructed model, compared with the masked one at sizes and scales that were not traced."""
    plan = random_plan(graph, ratio, seed=seed)
    small, masked = lp.reconstruct(model, graph, plan), copy.deepcopy(model)
    lp.mask_(masked, graph, plan)
    for x in (tokens(), tokens(3, 4, 2), tokens(1, 9, 3, scale=1e-3), tokens(seed=4, scale=30.0)):
        assert check_lossless(masked, small, x).passed
    return small


@pytest.mark.parametrize("norm", EXACT, ids=lambda norm: norm.__name__)
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_a_width_under_a_mean_goes_exactly(norm: Norm, ratio: float) -> None:
    model = made(Tokens(norm))
    graph = lp.trace(model, tokens())
    small = pruned(model, graph, ratio)
    assert graph.group("stem").prunable
    assert len(graph.means) == 1
    assert small.stem.out_features < WIDTH


@pytest.mark.parametrize(("norm", "reason"), STAY.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_what_no_factor_makes_up_for_stays_and_says_why(norm: Norm, reason: str) -> None:
    graph = lp.trace(made(Tokens(norm)), tokens())
    assert not graph.means
    assert re.search(reason, str(graph.group("stem").reason))
    assert graph.group("mlp.0").prunable


def test_statistics_lets_them_go_with_loss_and_rescales_nothing() -> None:
    graph = lp.trace(made(Tokens(nn.LayerNorm)), tokens(), statistics=True)
    assert graph.group("stem").prunable
    assert graph.group("stem").statistics
    assert not graph.means


def test_a_sum_over_channels_needs_nothing() -> None:
    model = made(Tokens(Normalised))
    graph = lp.trace(model, tokens())
    assert pruned(model, graph, 0.5).stem.out_features < WIDTH
    assert not graph.means


def test_a_mean_over_positions_before_a_gate_is_none_over_channels() -> None:
    class Squeeze(Rms):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(self.weight * x.mean(1, keepdim=True) + self.variance_epsilon)

    model = made(Tokens(Squeeze))
    graph = lp.trace(model, tokens())
    pruned(model, graph, 0.5)
    assert graph.group("stem").prunable
    assert not graph.means


def test_pruned_twice_the_factors_multiply() -> None:
    model = made(Tokens(Rms))
    once = pruned(model, lp.trace(model, tokens()), 0.4)
    twice = pruned(once, lp.trace(once, tokens()), 0.5, seed=1)
    left = twice.stem.out_features
    assert left < once.stem.out_features < WIDTH
    assert twice.norm.variance_epsilon == pytest.approx(1e-3 * WIDTH / left, rel=1e-14)


def test_channels_that_stay_count_too() -> None:
    class Shared(nn.Module):
        """Some channels under the norm reach the output."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm, self.head = nn.Linear(5, 8), nn.Linear(5, 4), Rms(12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            a, b = self.a(x), self.b(x)
            return self.head(self.norm(torch.cat([a, b], -1))), b

    model = made(Shared())
    small = pruned(model, lp.trace(model, tokens()), 0.5)
    assert (small.a.out_features, small.b.out_features) == (4, 4)
    assert small.norm.variance_epsilon == pytest.approx(1e-3 * 12 / 8, rel=1e-14)


def test_a_norm_that_several_call_is_rescaled_once() -> None:
    class Twice(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.stem(x))
            return self.head(self.norm(x + self.mlp(x)))

    model = made(Twice(OnePlus))
    graph = lp.trace(model, tokens())
    pruned(model, graph, 0.5)
    assert len(graph.means) == 1


def test_a_weight_that_other_code_uses_keeps_the_channels() -> None:
    class Peeks(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(self.mlp(self.norm(x)) + self.norm.weight * x)

    group = lp.trace(made(Peeks(Rms)), tokens()).group("stem")
    assert re.search("whose weight other code uses too", str(group.reason))


def test_a_weight_that_two_norms_share_keeps_the_channels() -> None:
    class Two(Tokens):
        def __init__(self) -> None:
            super().__init__(Rms)
            self.other = Rms(WIDTH)
            self.other.weight = self.norm.weight

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.stem(x))
            return self.head(self.other(x + self.mlp(x)))

    assert not lp.trace(made(Two()), tokens()).group("stem").prunable


def test_a_mean_teacher_is_rescaled_along() -> None:
    class Taught(Tokens):
        """In train mode the teacher follows; nothing runs it here."""

        def __init__(self) -> None:
            super().__init__(Rms)
            self.teacher = Tokens(Rms)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                for name, own in self.teacher.named_parameters():
                    own.data.lerp_(self.get_parameter(name).data, 0.1)
            return super().forward(x)

    model = made(Taught())
    graph = lp.trace(model, tokens())
    plan = random_plan(graph, 0.5)
    small, masked = lp.reconstruct(model, graph, plan), copy.deepcopy(model)
    lp.mask_(masked, graph, plan)
    assert graph.group("stem").prunable
    for one in (masked, small):
        one.train()(tokens())
    handle = lp.mask_(masked, graph, plan)
    assert check_lossless(masked.teacher, small.teacher, tokens()).passed
    handle.remove()


def test_an_unreached_twin_is_rescaled_along() -> None:
    class Domains(Tokens):
        """One norm for each of two domains, of which the trace sees one."""

        def __init__(self) -> None:
            super().__init__(Rms)
            self.norms = nn.ModuleList([self.norm, Rms(WIDTH)])
            self.domain = 0
            self.norms[1].weight.data += 1

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(x + self.mlp(self.norms[self.domain](x)))

    model = made(Domains())
    graph = lp.trace(model, tokens())
    plan = random_plan(graph, 0.5)
    with pytest.warns(lp.errors.UnreachedWarning):
        small = lp.reconstruct(model, graph, plan)
    masked = copy.deepcopy(model)
    lp.mask_(masked, graph, plan)
    masked.domain = small.domain = 1
    assert small.stem.out_features == WIDTH // 2
    assert check_lossless(masked, small, tokens()).passed


def test_a_penalty_on_the_weight_in_a_step_leaves_the_group_whole() -> None:
    x = tokens()

    def step(model: nn.Module) -> Tensor:
        return model(x).square().mean() + model.norm.weight.square().sum()

    result = lp.prune(made(Tokens(Rms)), x, ratio=0.5, also=[step])
    assert result.model.stem.out_features == WIDTH
    assert re.search("whose weight other code uses too", str(result.graph.group("stem").reason))


@pytest.mark.parametrize("norm", [InFloat32, NormalisedByShape])
def test_a_float32_model_is_compared_before_its_weights_are_rounded(norm: Norm) -> None:
    model = made(Tokens(norm)).float()
    result = lp.prune(model, tokens().float(), ratio=0.5)
    assert result.model.norm.weight.dtype == torch.float32
    assert (result.lossless.dtype, result.lossless.passed) == ("float64", True)
    assert result.lossless.max_rel_error < 1e-12
    report = check_lossless(result.masked, result.model, tokens().float())
    assert report.passed
    assert report.tolerance == 1e-5


def test_maps_with_channels_first() -> None:
    class Rms2d(Rms):
        def forward(self, x: Tensor) -> Tensor:
            scale = torch.rsqrt(x.pow(2).mean(1, keepdim=True) + self.variance_epsilon)
            return x * scale * self.weight.view(1, -1, 1, 1)

    model = nn.Sequential(nn.Conv2d(3, 8, 3), Rms2d(8), nn.SiLU(), nn.Conv2d(8, 6, 3), Rms2d(6), nn.Conv2d(6, 2, 1))
    made(model)
    x = torch.randn(1, 3, 9, 9, dtype=torch.float64)
    graph = lp.trace(model, x)
    plan = random_plan(graph, 0.5)
    small, masked = lp.reconstruct(model, graph, plan), copy.deepcopy(model)
    lp.mask_(masked, graph, plan)
    assert [group.prunable for group in graph.groups] == [True, True, False]
    assert check_lossless(masked, small, torch.randn(2, 3, 14, 11, dtype=torch.float64)).passed


def test_a_network_that_owns_a_scale_is_not_run_for_a_sum_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Network(nn.Module):  # SSD: an L2 norm in the code of the backbone, which would run for each try
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.stem, self.head = nn.Parameter(torch.ones(8)), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.scale.view(-1, 1, 1) * torch.nn.functional.normalize(self.stem(x).relu()))

    monkeypatch.setattr("lightning_prune.graph.rescaled_means.CutAlone", None)
    assert lp.trace(Network(), torch.randn(2, 3, 8, 8)).group("stem").prunable
