"""What trying out a smaller model costs, and that nothing is spared which would have told something."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.graph import compared_runs
from lightning_prune.graph.model_copies import cast_copy
from lightning_prune.graph.repeated_blocks import repeated_blocks
from tests.helpers import random_plan
from tests.zoo import Head, conv_bn, images, randomise_


class Chain(nn.Module):
    """A stem, equal blocks that are added, and a head; the first few runs of its forward can be counted."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.stem, self.head = conv_bn(3, 8), Head(8)
        self.blocks: Any = nn.ModuleList(Shuffled() for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Shuffled(nn.Module):
    """Two convolutions with a shuffle of two groups between them, which is a guess of a layout."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.groups = conv_bn(8, 8), conv_bn(8, 8), 2

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(x))
        b, c, h, w = x.shape
        x = x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)
        return F.relu(self.two(x))


def runs_of(monkeypatch: pytest.MonkeyPatch, model: nn.Module) -> list[str]:
    """Where the whole model runs while it is traced."""
    found: list[str] = []
    before = type(model).forward

    def forward(self: Any, x: Tensor) -> Tensor:
        found.append(f"{x.device.type} {x.dtype}".removeprefix("cpu ").removeprefix("torch."))
        return before(self, x)

    monkeypatch.setattr(type(model), "forward", forward)
    lp.trace(model, images().float())
    return found


def test_a_model_without_guesses_runs_once_with_its_channels_and_once_without(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(nn.Sequential):
        pass

    model = Plain(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    assert runs_of(monkeypatch, model) == ["float32", "meta torch.float32"]


def test_a_guess_that_holds_is_not_asked_about_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    found = runs_of(monkeypatch, randomise_(Chain()).float().eval())
    assert found.count("float32") == 1 + 4  # at two sizes, masked and without
    assert "float64" not in found


@pytest.mark.parametrize("agrees", [True, False])
def test_float64_says_once_whether_float32_is_to_be_believed(agrees: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.dtype] = []
    before = compared_runs.ComparedRuns.differs

    def differs(self: Any, *args: Any) -> Any:
        asked.append(self._dtype)
        return before(self, *args)

    monkeypatch.setattr(compared_runs.ComparedRuns, "differs", differs)
    for dtype in (torch.float32, torch.float64)[: 2 if agrees else 1]:
        monkeypatch.setitem(compared_runs.LIMITS, dtype, -1.0)  # nothing is close enough
    graph = lp.trace(randomise_(Chain()).eval(), images())
    assert graph.group("blocks.0.one.0").prunable is not agrees
    rare, often = (torch.float64, torch.float32) if agrees else (torch.float32, torch.float64)
    assert asked.count(rare) == 1 < asked.count(often)


@pytest.mark.parametrize("blocks", [1, 4])
def test_equal_blocks_are_compared_once_and_pruned_all(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Shuffled] = []
    before = Shuffled.forward

    def forward(self: Shuffled, x: Tensor) -> Tensor:
        ran.append(self)
        return before(self, x)

    monkeypatch.setattr(Shuffled, "forward", forward)
    model = randomise_(Chain(blocks)).eval()
    assert list(repeated_blocks(model)) == [f"blocks.{k}" for k in range(1, blocks)]
    graph = lp.trace(model, images())
    with_values = [block for block in ran if not block.one[0].weight.is_meta]
    assert len(with_values) == blocks + 4  # recorded, and two sizes of one block, masked and without
    plan = random_plan(graph, 0.5)
    small, masked = lp.reconstruct(model, graph, plan), copy.deepcopy(model)
    assert all(small.get_submodule(f"blocks.{k}.one.0").out_channels < 8 for k in range(blocks))
    lp.mask_(masked, graph, plan)
    assert lp.check_lossless(masked, small, images(3, seed=4)).passed


def test_blocks_that_differ_in_a_setting_or_a_hook_are_all_compared() -> None:
    model = Chain(4)
    model.blocks[2].groups = 4
    assert list(repeated_blocks(model)) == ["blocks.1", "blocks.3"]
    model.blocks[3].register_forward_hook(lambda *_: None)
    assert list(repeated_blocks(model)) == ["blocks.1"]


def test_a_block_that_stands_in_two_places_and_single_layers_are_no_repetition() -> None:
    block = Shuffled()
    assert not repeated_blocks(nn.Sequential(Shuffled(), block, nn.Sequential(block)))
    assert not repeated_blocks(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1)))


class Numbered(Chain):
    """Takes its blocks by number, so that it does not run without one."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for k in range(3):
            x = x + self.blocks[k](x)
        return self.head(x)


def test_a_model_that_needs_all_its_blocks_is_compared_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomise_(Numbered()).float().eval()
    assert "float64" not in runs_of(monkeypatch, model)
    assert lp.trace(model, images().float()).group("blocks.2.one.0").prunable


class LastWrong(Chain):
    """Its last block is built like the others, settings included, and is read in another way."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for block in list(self.blocks)[:-1]:
            x = x + block(x)
        hidden = F.relu(self.blocks[-1].one(x))
        b, c, h, w = hidden.shape
        return self.head(x + self.blocks[-1].two(hidden.reshape(b, h, w, c).permute(0, 3, 1, 2)))


def test_a_block_that_other_code_reads_is_not_taken_for_its_twin() -> None:
    model = randomise_(LastWrong()).eval()
    graph = lp.trace(model, images())
    plan = random_plan(graph, 0.5)
    small, masked = lp.reconstruct(model, graph, plan), copy.deepcopy(model)
    lp.mask_(masked, graph, plan)
    assert lp.check_lossless(masked, small, images(3, seed=4)).passed


def test_blocks_inside_a_block_that_is_left_out_go_with_it() -> None:
    def block() -> nn.Module:
        return nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()) for _ in range(2)))

    model = nn.Sequential(block(), block())
    assert list(found := repeated_blocks(model)) == ["1", "0.1"]
    assert len(list(cast_copy(model, torch.float32, found).parameters())) == 2
