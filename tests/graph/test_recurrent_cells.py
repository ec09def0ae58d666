"""Convolutional recurrent nets: channels of their states go, though code says how many zeros they start with."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.plan import GroupPlan, Plan
from tests.graph.recurrent_cells import MODELS, Video
from tests.zoo import randomise_

STATES = {  # what makes the states
    "lstm": {"cells.0.conv": 10, "cells.1.conv": 8},
    "lstm, one size": {"cells.0.conv": 8, "cells.1.conv": 8},
    "gru": {"cells.0.gates": 10, "cells.1.gates": 8},
    "stateful": {"conv": 8},
    "listed": {"of_x.0": 10, "of_x.1": 8},
    "listed, one size": {"of_x.0": 8},  # one number, maybe: all layers go together
    "memory": {"cells.0.conv_x": 8},  # one number for all of its states
    "layers": {"gates.0": 8},
    "like": {"of_x": 8},
    "linear": {"of_both": 8},
}
STAY = {
    "goes on": ("conv", "meets a tensor of fixed size"),
    "literal": ("gate", r"has a size that is fixed in the Python code around aten\.zeros at 'recurrent'"),
    "shaped": ("gate", "has a size that is fixed in the Python code around 'recurrent.gate'"),
    "marked": ("gate", r"reads an input of fixed size in aten\.convolution at 'recurrent.gate'"),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise_(Video(MODELS[name]())).double()


def videos(samples: int = 2, frames: int = 3, *size: int) -> Tensor:
    generator = torch.Generator().manual_seed(samples + frames)
    return torch.randn(samples, frames, 3, *(size or (8, 8)), generator=generator).double()


UNSEEN = [videos(3, 5, 10, 7), videos(1, 1, 6, 6), videos(2, 2)]


def differ(first: nn.Module, second: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        a, b = copy.deepcopy(first).eval()(x), copy.deepcopy(second).eval()(x)
    return float((a - b).abs().max() / a.abs().max())


@pytest.mark.parametrize("name", STATES)
def test_channels_of_the_states_go(name: str, tmp_path) -> None:
    result = lp.prune(build(name), videos(), selection=lp.LayerRatio(0.5))
    assert {group.name: group.size for group in result.graph.prunable_groups} == {
        "encoder.0": 12,
        **{f"recurrent.{layer}": size for layer, size in STATES[name].items()},
    }
    assert all(differ(result.masked, result.model, x) < 1e-10 for x in UNSEEN)
    small, dense = (sum(p.numel() for p in model.parameters()) for model in (result.model, result.masked))
    assert small < 0.42 * dense
    lp.save(tmp_path / "small.pt", result.model, result.plan)
    lp.load(tmp_path / "small.pt", loaded := build(name))
    assert differ(result.model, loaded, UNSEEN[0]) == 0


@pytest.mark.parametrize("name", STAY)
def test_states_stay_whose_size_nothing_can_follow(name: str) -> None:
    result = lp.prune(build(name), videos(), selection=lp.LayerRatio(0.5))
    layer, reason = STAY[name]
    group = next(g for g in result.graph.groups if f"recurrent.{layer}" in [one.name for one in g.layers])
    assert not group.prunable
    assert re.search(reason, str(group.reason))
    assert result.model.encoder[0].out_channels == 6  # which only feeds them
    with torch.no_grad():
        masked, small = (copy.deepcopy(model).eval()(videos(2, 4)) for model in (result.masked, result.model))
    assert name == "goes on" or torch.allclose(masked, small, rtol=1e-10)


@pytest.mark.parametrize("name", ["lstm", "gru", "stateful", "layers", "linear"])
def test_a_masked_channel_of_a_state_is_zero_from_first_to_last(name: str) -> None:
    model = build(name)
    graph = lp.trace(model, videos())
    group = next(group for group in graph.prunable_groups if group.name.startswith("recurrent."))
    plan = Plan({group.name: GroupPlan(group.size, (0, 3))})
    read = [part for part in group.slices if part.layer is None and part.dim == 1]
    assert read
    assert not any(part.masked for part in read)  # there is nothing to mask
    states = []
    cell = model.recurrent.cells[0] if hasattr(model.recurrent, "cells") else model.recurrent
    cell.register_forward_hook(lambda _, inputs, output: states.append(output[0] if name == "lstm" else output))
    with lp.mask_(model.eval(), graph, plan), torch.no_grad():
        model(videos())
    for state in states if name != "layers" else []:
        gone = [k for k in range(group.size) if k not in (0, 3)]
        assert state[:, gone].abs().max() == 0
        assert state[:, [0, 3]].abs().min() > 0


@pytest.mark.parametrize("name", ["lstm", "gru", "memory", "listed"])
def test_training_the_masked_and_the_small_model_is_the_same(name: str) -> None:
    result = lp.prune(build(name), videos(), ratio=0.5)
    for model in (result.masked, result.model):
        optimizer = torch.optim.SGD(model.train().parameters(), 0.1, momentum=0.9, weight_decay=0.1)
        for step in range(4):
            optimizer.zero_grad()
            model(videos(2, 3 + step)).square().mean().backward()
            optimizer.step()
    assert differ(result.masked, result.model, UNSEEN[0]) < 1e-9


class Padded(nn.Module):
    """Joins as many channels of zeros as make up for those that its shortcut lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.stem, self.conv, self.out = 20, nn.Conv2d(3, 8, 1), nn.Conv2d(8, 20, 1), nn.Conv2d(20, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        zeros = x.new_zeros(len(x), self.width - x.size(1), *x.shape[2:])
        return self.out(torch.cat([x, zeros], 1) + self.conv(x))


def test_zeros_that_are_joined_to_channels() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 8, 8).double()
    result = lp.prune(Padded().double(), images, selection=lp.LayerRatio(0.5))
    assert result.model.conv.out_channels == 10
    assert differ(result.masked, result.model, torch.randn(3, 3, 5, 6).double()) < 1e-10


class Overwritten(nn.Module):
    """One result is copied over another: they go together."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y[1:].copy_(self.b(x)[1:])
        return self.out(y)


def test_what_is_copied_over_channels_goes_with_them() -> None:
    torch.manual_seed(0)
    result = lp.prune(Overwritten().double(), torch.randn(2, 3, 8, 8).double(), ratio=0.5)
    assert [[layer.name for layer in group.layers] for group in result.graph.prunable_groups] == [["a", "b"]]
    assert differ(result.masked, result.model, torch.randn(3, 3, 5, 6).double()) < 1e-10
