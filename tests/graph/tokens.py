"""A vision transformer around the attention under test, and its pruning compared at sizes that were not traced."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from lightning_prune.graph import ChannelGraph, trace
from lightning_prune.reconstruction.lossless import check_lossless
from lightning_prune.reconstruction.masks import mask_
from lightning_prune.reconstruction.small_model import reconstruct
from tests.helpers import random_plan
from tests.zoo import randomise_


class Block(nn.Module):
    """Pre-norm attention and MLP, as vision transformers have it."""

    def __init__(self, attention: nn.Module, width: int = 16) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attention = nn.LayerNorm(width), nn.LayerNorm(width), attention
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Tokens(nn.Module):
    """Patches of 4 px, blocks, mean over tokens."""

    def __init__(self, *attentions: nn.Module, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 4, stride=4)
        self.blocks = nn.Sequential(*(Block(attention, width) for attention in attentions))
        self.head = nn.Linear(width, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(images).flatten(2).transpose(1, 2)).mean(1))


def images(samples: int = 2, size: int = 16) -> Tensor:
    return torch.randn(samples, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))


def smaller(model: nn.Module, ratio: float = 0.5) -> tuple[nn.Module, ChannelGraph, nn.Module]:
    """The model, its graph and the reconstructed model, compared with the masked one also at a size not traced."""
    model = randomise_(model).double().eval()
    graph = trace(model, images())
    plan = random_plan(graph, ratio)
    small, masked = reconstruct(model, graph, plan), copy.deepcopy(model)
    mask_(masked, graph, plan)
    for x in (images(3), images(1, 24)):
        assert check_lossless(masked, small, x).passed
    return model, graph, small
