"""Masks stay exactly zero through training, and masked training is reconstructed training."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.errors import ReconstructionError
from lightning_prune.graph import trace
from lightning_prune.reconstruction.holding import Zeros
from lightning_prune.reconstruction.masks import MaskHandle, mask_, mask_once_
from lightning_prune.reconstruction.small_model import cuts, reconstruct, reconstruct_
from tests.helpers import random_plan
from tests.zoo import build, images

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.05, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    "adam-foreach": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
}


def train_(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, *, clip: float | None = None, watch=None
) -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(steps):
        x = torch.randn(4, 3, 8, 8, generator=generator, dtype=torch.float64)
        y = torch.randint(5, (4,), generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        if watch:
            watch()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_masked_entries_are_exactly_zero_at_every_forward(make) -> None:
    model = build("InvertedResidual").train()
    graph = trace(model, images())
    optimizer = make(model.parameters())
    train_(model, optimizer, 3)  # momentum that would move masked entries
    handle = mask_(model, graph, random_plan(graph), optimizers=[optimizer])
    seen = []
    train_(model, optimizer, 6, clip=1.0, watch=lambda: seen.append(handle.is_zero()))
    assert seen == [True] * 6
    assert handle.is_zero()
    states = [
        value.index_select(zeros.dim, zeros.entries)
        for zeros in handle.zeros
        for value in optimizer.state[model.get_parameter(zeros.parameter)].values()
        if value.dim() > 0
    ]
    assert len(states) >= len(handle.zeros)
    assert not any(value.any() for value in states)


def test_masks_win_over_whatever_writes_into_the_weights() -> None:
    model, x = build("Residual"), images()
    graph = trace(model, x)
    handle = mask_(model, graph, random_plan(graph))
    masked = model(x)
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        for zeros in handle.zeros:
            parameter = model.get_parameter(zeros.parameter)
            parameter.index_fill_(zeros.dim, zeros.entries, 0.3)  # an average, a loaded checkpoint, noise
    assert not handle.is_zero()
    assert torch.equal(model(x), masked)
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())


def test_a_module_called_twice_has_the_gradients_of_plain_zeros() -> None:
    model, x = build("Shared").train(), images(4)
    graph = trace(model, x)
    plan = random_plan(graph)
    plain = copy.deepcopy(model)
    mask_once_(plain, graph, plan)
    handle = mask_(model, graph, plan)
    for one in (plain, model):
        one(x).square().sum().backward()
    for zeros in handle.zeros:
        zeros.clear_(plain.get_parameter(zeros.parameter).grad)
    assert model.twice.weight.grad.any()
    for (name, masked), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(masked.grad, other.grad, rtol=1e-10), name


def test_a_copy_of_a_masked_model_stays_masked() -> None:
    model, x = build("Residual"), images()
    graph = trace(model, x)
    handle = mask_(model, graph, random_plan(graph))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for zeros in handle.zeros:
            twin.get_parameter(zeros.parameter).index_fill_(zeros.dim, zeros.entries, 0.3)
    assert torch.equal(twin(x), model(x))


@pytest.mark.parametrize("make", [OPTIMIZERS["sgd"], OPTIMIZERS["adamw"]], ids=["sgd", "adamw"])
@pytest.mark.parametrize(
    "name", ["Residual", "InvertedResidual", "Dense", "Grouped", "PreActivation", "SigmoidConstant"]
)
def test_fine_tuning_masked_and_reconstructed_is_the_same_computation(name: str, make) -> None:
    model = build(name).train()
    graph = trace(model, images())
    plan = random_plan(graph)
    small = reconstruct(model, graph, plan)
    mask_(model, graph, plan)
    train_(model, make(model.parameters()), 20, clip=5.0)
    train_(small, make(small.parameters()), 20, clip=5.0)
    state = model.state_dict()
    for cut in cuts(graph, plan):
        state[cut.tensor] = cut.apply(state[cut.tensor])
    for key, value in small.state_dict().items():
        assert torch.allclose(state[key].double(), value.double(), rtol=1e-8, atol=1e-8), key


def test_reconstructing_in_place_asks_for_the_masks_to_be_released() -> None:
    model = build("Residual")
    graph = trace(model, images())
    plan = random_plan(graph)
    handle = mask_(model, graph, plan)
    with pytest.raises(ReconstructionError, match=r"MaskHandle.remove"):
        reconstruct_(model, graph, plan)
    handle.remove()
    reconstruct_(model, graph, plan, example_inputs=images())


def test_masks_on_frozen_parameters_have_to_be_released_too() -> None:
    model = build("Residual").requires_grad_(False)
    graph = trace(model, images())
    plan = random_plan(graph)
    mask_(model, graph, plan)
    with pytest.raises(ReconstructionError, match=r"MaskHandle.remove"):
        reconstruct_(model, graph, plan)


def test_as_a_context_manager_masks_are_undone() -> None:
    model, x = build("Residual"), images()
    graph = trace(model, x)
    dense = model(x)
    with mask_(model, graph, random_plan(graph)):
        assert not torch.equal(model(x), dense)
    assert torch.equal(model(x), dense)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_gradients_that_were_there_before_are_cleared_too() -> None:
    model = build("Residual").train()
    graph = trace(model, images())
    model(images(4)).square().sum().backward()
    handle = mask_(model, graph, random_plan(graph))
    gradients = [(model.get_parameter(zeros.parameter).grad, zeros) for zeros in handle.zeros]
    assert all(gradient.any() for gradient, _ in gradients)
    assert not any(gradient.index_select(zeros.dim, zeros.entries).any() for gradient, zeros in gradients)


class Sum(nn.Module):
    """Two parameters with one gradient, which autograd hands to both as the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

    def forward(self) -> Tensor:
        return (self.a + self.b).square().sum()


def test_the_gradient_of_another_parameter_stays() -> None:
    model = Sum()
    handle = MaskHandle(model, [Zeros("a", 0, torch.tensor([1]))])
    model().backward()
    assert model.a.grad.tolist() == [4, 0, 4]
    assert model.b.grad.tolist() == [4, 2, 4]
    handle.undo()
    assert model.a.tolist() == [1, 1, 1]


class Functional(nn.Module):
    """Reads the parameters of a convolution that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Module()
        self.part.a, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(nn.functional.conv2d(x, self.part.a.weight, self.part.a.bias).tanh())


class Shifts(nn.Module):
    """Has parameters in a container."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        self.shifts = nn.ParameterDict({"x": torch.ones(8, 1, 1)})

    def forward(self, x: Tensor) -> Tensor:
        return self.c((self.a(x) + self.shifts["x"]).tanh())


COPIES = {
    "itself": lambda model: model,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("kind", [Functional, Shifts])
def test_parameters_of_modules_that_are_never_called_are_held_in_copies_too(kind, copied) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(kind(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).double().train()
    graph = trace(model, images())
    handle = mask_(model, graph, random_plan(graph))
    other = copied(model)

    def is_zero() -> bool:
        named = dict(other.named_parameters())
        return not any(named[item.parameter].index_select(item.dim, item.entries).any() for item in handle.zeros)

    other[0](images())  # a part alone
    train_(other, torch.optim.AdamW(other.parameters(), 0.01), 3)
    other(images())
    assert is_zero()
    for parameter in other.parameters():
        nn.init.constant_(parameter, 0.5)
    other[0](images())
    other(images())
    assert is_zero()


def test_where_every_module_is_called_only_they_hold() -> None:
    model = build("Residual").train()
    graph = trace(model, images())
    handle = mask_(model, graph, random_plan(graph))
    for _ in range(2):
        model(images())
    owners = {item.parameter.rpartition(".")[0] for item in handle.zeros}
    assert {path for path, module in model.named_modules() if module._forward_pre_hooks} == owners
    handle.remove()
    assert not any(module._forward_pre_hooks for module in model.modules())


class Both(nn.Module):
    """Runs a model and a copy of it."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


@pytest.mark.parametrize("kind", [Functional, Shifts])
def test_masks_that_came_along_with_a_copy_let_go_of_what_is_cut(kind) -> None:
    torch.manual_seed(0)
    first = kind().double().train()
    graph = trace(first, images())
    handle = mask_(first, graph, random_plan(graph))
    second = copy.deepcopy(first)
    handle.remove()
    model = nn.Sequential(Both(first, second), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).double().train()
    train_(model, torch.optim.SGD(model.parameters(), 0.1), 2)
    graph = trace(model, images())
    report = reconstruct_(model, graph, random_plan(graph, seed=1), example_inputs=images())
    assert report.passed
    assert second.c.in_channels < 8
    train_(model, torch.optim.SGD(model.parameters(), 0.1), 2)
    graph = trace(model, images())
    with mask_(model, graph, random_plan(graph, seed=2)):
        train_(model, torch.optim.SGD(model.parameters(), 0.1), 2)
