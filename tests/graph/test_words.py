"""Models of words: what an embedding picks depends on the input, and code casts to float32 or slices nothing off."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.reconstruction.lossless import check_lossless
from tests.graph.norms_over_channels import InFloat32
from tests.helpers import random_plan
from tests.zoo import randomise_


class Mlp(nn.Module):
    """A gated MLP whose hidden channels are added up in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 20), nn.Linear(10, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, -1)
        hidden = F.silu(gate) * value
        angle = 1e4 * hidden.float().square().sum(-1, keepdim=True)  # which makes much of what float32 rounds
        return self.down(hidden * angle.cos().type_as(hidden))


class Words(nn.Module):
    """An embedding, a block in which so many leading words are left as they are, and a head."""

    def __init__(self, prefix: int = 0) -> None:
        super().__init__()
        self.prefix = prefix
        self.table, self.norm, self.mlp = nn.Embedding(11, 12), InFloat32(12), Mlp(12)
        self.mixed = nn.Linear(12, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, words: Tensor) -> Tensor:
        x = self.table(words)
        x = x + self.mlp(self.norm(x))
        x = torch.cat([x[:, : self.prefix], self.mixed(x)[:, self.prefix :]], 1)
        return self.head(x)


def words(batch: int = 2, length: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(seed))


def check(prefix: int) -> lp.ChannelGraph:
    model = randomise_(Words(prefix)).double().eval()
    graph = lp.trace(model, words())
    plan = random_plan(graph, 0.5)
    small, masked = lp.reconstruct(model, graph, plan), copy.deepcopy(model)
    lp.mask_(masked, graph, plan)
    for x in (words(), words(3, 9, seed=1)):
        assert check_lossless(masked, small, x).passed
    assert small.table.embedding_dim == small.mlp.down.out_features
    return graph


def test_the_width_of_an_embedding_goes_with_the_layers_that_add_to_it() -> None:
    graph = check(prefix=1)
    assert {group.name: group.prunable for group in graph.groups} == {"mlp.up": True, "mlp.down": True, "head": False}


def test_an_empty_slice_freezes_nothing() -> None:
    graph = check(prefix=0)
    assert graph.group("mlp.up").prunable
    assert graph.group("mlp.down").prunable
