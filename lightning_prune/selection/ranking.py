"""The order in which channels go when the whole network is ranked at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from lightning_prune.selection.base import ByLayer, Question


class Ranking:
    """Every channel that may go, weakest first: score order, ties in the order of the network.

    A channel that ``min_channels`` keeps is no part of it, and does not end it either.

    Args:
        question: the groups and their scores.
        least: how many of so many channels have to stay.

    Attributes:
        layers: what is ranked, as (group, name of the layer).
        owners: the layer that loses a channel at every step, as an index into ``layers``: (steps,).
    """

    def __init__(self, question: Question, least: Callable[[int], int]) -> None:
        self.layers = [(group, name) for group in question.groups for name in question.ranked[group.name]]
        self._sizes = [group.size for group, _ in self.layers]
        scores = torch.cat([question.ranked[group.name][name] for group, name in self.layers])
        owner = torch.repeat_interleave(torch.arange(len(self._sizes)), torch.tensor(self._sizes))
        room = [size - least(size) for size in self._sizes]
        weakest = []
        ranked = torch.argsort(scores, stable=True)
        for position, layer in zip(ranked.tolist(), owner[ranked].tolist(), strict=True):
            if room[layer]:
                room[layer] -= 1
                weakest.append(position)
        self._positions = torch.tensor(weakest, dtype=torch.int64)
        self.owners = owner[self._positions]

    def __len__(self) -> int:
        return len(self._positions)

    def kept(self, count: int, back: Iterable[int] = ()) -> ByLayer:
        """What stays once the first ``count`` are gone, but for those of the steps ``back``."""
        alive = torch.ones(sum(self._sizes), dtype=torch.bool)
        alive[self._positions[:count]] = False
        alive[self._positions[list(back)]] = True
        kept: ByLayer = {}
        for (group, name), mask in zip(self.layers, alive.split(self._sizes), strict=True):
            kept.setdefault(group.name, {})[name] = mask
        return kept
