"""A module's eps and weight that make up for a mean over fewer channels: in training, files and optimizers."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.errors import ReconstructionError
from lightning_prune.model_state.cutting import MeanRescaling, Undo, changed_sizes, rescale_means_
from lightning_prune.reconstruction.lossless import check_lossless
from lightning_prune.schedule import Rounds
from tests.graph.norms_over_channels import Grn, Rms
from tests.helpers import random_plan
from tests.zoo import randomise_


def model_with(norm: type[nn.Module]) -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 12), norm(12), nn.GELU(), nn.Linear(12, 8), norm(8), nn.Linear(8, 3))
    return randomise_(model).double()


def tokens(seed: int = 1) -> Tensor:
    return torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def train_(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        model(tokens(step)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("norm", [Rms, Grn])
def test_masked_training_then_reconstruction_in_rounds(norm: type[nn.Module]) -> None:
    model = model_with(norm)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    session = lp.PruningSession(model, tokens(), schedule=Rounds(2, epochs=1), ratio=0.6)
    while not session.done:
        session.step(optimizers=[optimizer])
        train_(model, optimizer)
        masked = copy.deepcopy(model)
        assert session.reconstruct_(optimizers=[optimizer]).passed
        assert check_lossless(masked, model, tokens(7)).passed
        train_(model, optimizer)
    assert model[0].out_features < 12
    assert model[1].get_parameter("weight" if norm is Rms else "gamma").numel() == model[0].out_features


def test_a_pruned_file_gives_the_dense_model_its_eps_too(tmp_path: Path) -> None:
    model = model_with(Rms)
    result = lp.prune(model, tokens(), ratio=0.5)
    assert changed_sizes(result.model)["1"]["variance_epsilon"] > 1e-3
    lp.save(tmp_path / "small.pt", result.model, result.plan)
    for loaded in (model_with(Rms), copy.deepcopy(result.model)):  # one that has it already
        lp.load(tmp_path / "small.pt", loaded)
        assert check_lossless(result.model, loaded, tokens(3), tolerance=0.0).passed


def test_on_failure_eps_and_weight_are_as_they_were() -> None:
    model = model_with(Rms)
    graph = lp.trace(model, tokens())
    before = copy.deepcopy(model.state_dict())

    def fails(other: nn.Module) -> None:
        if other[0].out_features < 12:
            raise ValueError("too small")

    plan = random_plan(graph, 0.5)
    with pytest.raises((ReconstructionError, lp.errors.NotReconstructedWarning)):
        lp.reconstruction.reconstruct_(model, graph, plan, example_inputs=tokens(), also=[fails])
    assert model[1].variance_epsilon == 1e-3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_gradients_and_moments_are_those_of_the_larger_weight() -> None:
    """With g' = s g the gradient is 1 / s of what it was."""
    model = nn.Sequential(Rms(4)).double()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 4, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    state = optimizer.state[model[0].weight]
    before = [model[0].weight.grad, state["exp_avg"], state["exp_avg_sq"], state["step"]]
    undo = Undo(model, [optimizer])
    rescale_means_(model, [MeanRescaling("0", "variance_epsilon", 4.0, "0.weight", 2.0, 0.0)], [optimizer])
    after = [model[0].weight.grad, state["exp_avg"], state["exp_avg_sq"], state["step"]]
    for one, other, factor in zip(before, after, (0.5, 0.5, 0.25, 1.0), strict=True):
        assert torch.equal(one * factor, other)
    undo()
    assert model[0].variance_epsilon == 1e-3
    assert torch.equal(state["exp_avg"], before[1])
    assert changed_sizes(model) == {}
