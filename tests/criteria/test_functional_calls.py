"""Layers that are called without their module are scored as those that are called as modules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.criteria import GRE, JRE, LRE, NextLayerTaylor, Taylor, ThiNet
from lightning_prune.criteria.scoring import score
from lightning_prune.errors import ScoreError
from lightning_prune.graph import trace
from tests.zoo import randomise_

OF_LAYERS = [JRE(), LRE(), GRE(), Taylor(), ThiNet(), NextLayerTaylor(), NextLayerTaylor(form="weight")]
OF_WHAT_ENTERS = [JRE(site="activation"), Taylor(site="activation")]


class Mlp(nn.Module):
    """Two layers, called as modules or by their weights."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.functional = functional
        self.up, self.down, self.head = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.functional:
            hidden = F.relu(F.linear(x, self.up.weight, self.up.bias))
            return self.head(F.linear(bias=self.down.bias, weight=self.down.weight, input=hidden))
        return self.head(self.down(F.relu(self.up(x))))


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def scored(model: nn.Module, criterion: Any, x: Tensor) -> dict[str, Tensor]:
    model = model.double().eval()
    found = score(model, trace(model, x[:2]), criterion, [(x, None)], loss=lambda m, batch: m(batch[0]).square().mean())
    return {name: found[name] for name in found}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("criterion", [*OF_LAYERS, *OF_WHAT_ENTERS], ids=repr)
def test_the_same_scores_as_of_modules(criterion: Any, inside: bool) -> None:
    modules = randomise_(Mlp(False))
    functions = copy.deepcopy(modules)
    functions.functional = True
    both = [nn.Sequential(model) if inside else model for model in (modules, functions)]
    expected, found = (scored(model, criterion, tokens(4, 6)) for model in both)
    assert expected.keys() == found.keys() >= ({"0.up", "0.down"} if inside else {"up", "down"})
    for name, values in expected.items():
        assert torch.allclose(values, found[name])


class Weights(nn.Module):
    """A block that keeps the weight of its second layer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(self.up(x)), self.down)


def test_what_a_block_reads_in_its_own_code_is_not_taken_for_what_enters_it() -> None:
    model = randomise_(nn.Sequential(nn.Linear(6, 6), Weights(), nn.Linear(6, 3)))
    assert scored(model, JRE(), tokens(4, 6))["1.up"].isfinite().all()
    with pytest.raises(
        ScoreError, match=r"^1\.up: code of 1 reads its channels.*use site='bn' instead of 'activation'"
    ):
        scored(model, JRE(site="activation"), tokens(4, 6))


class Attention(nn.Module):
    """What `torch.nn.MultiheadAttention` computes, its projections as modules."""

    def __init__(self, own: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads, self.scale = own.num_heads, own.head_dim**-0.5
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.qkv.weight, self.qkv.bias = own.in_proj_weight, own.in_proj_bias
        self.out.weight, self.out.bias = own.out_proj.weight, own.out_proj.bias

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Around(nn.Module):
    """An attention between two layers."""

    def __init__(self, attention: nn.Module, heads: bool) -> None:
        super().__init__()
        self.attention, self.head, self.mha = attention, nn.Linear(8, 3), heads

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x)[0] if self.mha else self.attention(x))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("criterion", OF_LAYERS, ids=repr)
def test_heads_are_scored_by_what_their_projections_return(criterion: Any, batch_first: bool) -> None:
    own = randomise_(nn.MultiheadAttention(8, 1, batch_first=batch_first))
    x = tokens(4, 5, 8)
    attention = scored(around := Around(own, True), criterion, x if batch_first else x.transpose(0, 1))
    plain = Around(Attention(own), False)
    plain.head = around.head
    expected = scored(plain, criterion, x)
    assert type(own) is nn.MultiheadAttention
    name = next(iter(attention))
    assert len(attention[name]) == 8
    assert torch.isfinite(attention[name]).all()
    if not isinstance(criterion, ThiNet):  # whose samples of outputs depend on the name of the layer
        assert torch.allclose(attention[name], expected["attention.qkv"])
