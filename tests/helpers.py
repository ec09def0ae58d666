"""Small things that several test files need."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_prune.graph import ChannelGraph
from lightning_prune.plan import Plan
from lightning_prune.selection import LayerRatio


class RandomScores(dict[str, Tensor]):
    """Independent uniform scores for every layer of every group."""

    def __init__(self, graph: ChannelGraph, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.layers = {
            group.name: {layer.name: torch.rand(group.size, generator=generator) for layer in group.layers}
            for group in graph.groups
        }
        super().__init__({name: torch.stack(list(of.values())).mean(0) for name, of in self.layers.items()})


def random_plan(graph: ChannelGraph, ratio: float = 0.5, coupling: str = "joint", seed: int = 0, **options) -> Plan:
    """A plan that removes ``ratio`` of every layer at random."""
    return LayerRatio(ratio).select(graph, RandomScores(graph, seed), coupling=coupling, **options)
