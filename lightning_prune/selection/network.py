"""The weakest channels over the whole network, wherever they are: a share of them, or a number."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Literal, final, get_args

import torch
from torch import Tensor
from typing_extensions import override

from lightning_prune.errors import PlanError
from lightning_prune.graph import ChannelGraph, Group
from lightning_prune.selection.base import Kept, Question, Selection, changed, check_ratio, is_count

Over = Literal["all", "inner", "groups"]


class Order:
    """Every channel that may go, weakest first: score order, ties in the order of the network.

    A channel that ``min_channels`` keeps is no part of it, and does not end it either.

    Args:
        question: the groups and their scores.
        least: how many of so many channels have to stay.
    """

    def __init__(self, question: Question, least: Callable[[int], int]) -> None:
        self.layers = [(group, name) for group in question.groups for name in question.ranked[group.name]]
        scores = torch.cat([question.ranked[group.name][name] for group, name in self.layers])
        sizes = torch.tensor([group.size for group, _ in self.layers])
        owner = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        room = [group.size - least(group.size) for group, _ in self.layers]
        positions: list[int] = []
        owners: list[int] = []
        ranked = torch.argsort(scores, stable=True)
        for position, layer in zip(ranked.tolist(), owner[ranked].tolist(), strict=True):
            if room[layer]:
                room[layer] -= 1
                positions.append(position)
                owners.append(layer)
        self._sizes = sizes.tolist()
        self._positions = torch.tensor(positions, dtype=torch.int64)
        self.owners = torch.tensor(owners, dtype=torch.int64)  # the layer of every step, as an index into `layers`

    def __len__(self) -> int:
        return len(self._positions)

    def kept(self, count: int, back: Iterable[int] = ()) -> Kept:
        """What stays once the first ``count`` are gone, but for those of the steps ``back``."""
        alive = torch.ones(sum(self._sizes), dtype=torch.bool)
        alive[self._positions[:count]] = False
        alive[self._positions[list(back)]] = True
        kept: Kept = {}
        for (group, name), mask in zip(self.layers, alive.split(self._sizes), strict=True):
            kept.setdefault(group.name, {})[name] = mask
        return kept


class NetworkSelection(Selection, ABC):
    """Removes the weakest channels over the network until a number of them is gone.

    Args:
        over: what is counted: ``all`` filters of all prunable layers, ``groups``: every channel of a group
            counts once, ``inner``: only layers that feed no addition are candidates (JRE's ResNet setting), that is
            groups of one layer and the depthwise convolutions behind it.
        min_channels: see `Selection`.
        round_to: see `Selection`.
        ignore: see `Selection`.

    Raises:
        PlanError: unknown ``over``; in `select` also if it leaves no candidate.
    """

    def __init__(
        self, *, over: Over = "all", min_channels: float = 1, round_to: int = 1, ignore: Iterable[str] = ()
    ) -> None:
        super().__init__(min_channels=min_channels, round_to=round_to, ignore=ignore)
        if over not in get_args(Over):
            raise PlanError(f"over must be one of {', '.join(get_args(Over))}, got {over!r}")
        self.over = over

    @abstractmethod
    def _limit(self, total: int) -> float:
        """How many channels go, of so many."""

    @final
    def total(self, graph: ChannelGraph) -> int:
        """How many channels there are, counted as ``over`` says.

        Raises:
            PlanError: nothing to prune.
        """
        return sum(group.size * self._cost(group, "") for group in self._candidates(graph))

    @final
    def _candidates(self, graph: ChannelGraph) -> list[Group]:
        groups = super()._candidates(graph)
        if self.over == "inner":
            groups = [group for group in groups if _is_chain(group)]
            if not groups:
                raise PlanError("over='inner': every prunable layer feeds an addition; use over='all' or 'groups'")
        return groups

    @final
    def _kept(self, question: Question) -> Kept:
        order = Order(question, self._least)
        costs = torch.tensor([self._cost(group, name) for group, name in order.layers])
        total = sum(group.size * self._cost(group, name) for group, name in order.layers)
        gone: Tensor = costs[order.owners].cumsum(0)
        return order.kept(int((gone <= self._limit(total) + 1e-9).sum()))

    def _cost(self, group: Group, layer: str) -> int:
        """How many channels one channel counts for."""
        if self.over == "groups":
            return 1
        layers = [group.layer(layer)] if layer else group.layers
        return sum(member.index.shape[1] for member in layers)


@final
class GlobalRatio(NetworkSelection):
    """The weakest share over the whole network, wherever they are (JRE, Taylor, BN scale).

    Args:
        ratio: share removed, in [0, 1).
        over: what the share is of, see `NetworkSelection`.
        min_channels: see `Selection`.
        round_to: see `Selection`.
        ignore: see `Selection`.

    Raises:
        PlanError: a ratio outside [0, 1), or ``over`` leaves no candidate.

    Example:
        >>> GlobalRatio(0.5)
        GlobalRatio(ratio=0.5, over='all', min_channels=1, round_to=1, ignore=())
    """

    def __init__(
        self,
        ratio: float = 0.5,
        *,
        over: Over = "all",
        min_channels: float = 1,
        round_to: int = 1,
        ignore: Iterable[str] = (),
    ) -> None:
        super().__init__(over=over, min_channels=min_channels, round_to=round_to, ignore=ignore)
        self.ratio = check_ratio(ratio)

    def __repr__(self) -> str:
        return (
            f"GlobalRatio(ratio={self.ratio!r}, over={self.over!r}, min_channels={self.min_channels!r}, "
            f"round_to={self.round_to!r}, ignore={self.ignore!r})"
        )

    @override
    def part(self, share: float) -> GlobalRatio:
        return changed(self, ratio=share * self.ratio)

    def _asks_for_removal(self) -> bool:
        return self.ratio > 0

    def _limit(self, total: int) -> float:
        return self.ratio * total


@final
class ChannelsPerRound(NetworkSelection):
    """A fixed number of channels per round, the weakest over the whole network (JRE: 128 per round).

    The plan of a round is that of all rounds so far: what earlier ones removed has to come last in the scores, see
    `lightning_prune.schedule.keep_removed`. It never removes more than asked, and less only where ``min_channels``
    leaves no more, or where the next channel counts for several filters and one of them would be too many. To run
    rounds up to a ratio inside a fit, use `lightning_prune.schedule.Rounds`.

    Args:
        channels: removed per round.
        round: which round this is, from 1 on.
        over: what counts as a channel, see `NetworkSelection`.
        min_channels: see `Selection`.
        round_to: see `Selection`.
        ignore: see `Selection`.

    Raises:
        PlanError: less than one channel or round, or ``over`` leaves no candidate.

    Example:
        >>> import torch, lightning_prune as lp
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> graph = lp.trace(model, torch.zeros(1, 3))
        >>> first = ChannelsPerRound(3).select(graph, lp.score(model, graph, "l1"))
        >>> later = lp.schedule.keep_removed(lp.score(model, graph, "fpgm"), first)  # after fine-tuning
        >>> second = ChannelsPerRound(3, round=2).select(graph, later)
        >>> len(second.groups["0"].removed), set(first.groups["0"].removed) < set(second.groups["0"].removed)
        (6, True)
    """

    def __init__(
        self,
        channels: int = 128,
        *,
        round: int = 1,
        over: Over = "all",
        min_channels: float = 1,
        round_to: int = 1,
        ignore: Iterable[str] = (),
    ) -> None:
        super().__init__(over=over, min_channels=min_channels, round_to=round_to, ignore=ignore)
        if not is_count(channels) or not is_count(round):
            raise PlanError(f"channels and round must be integers >= 1, got {channels!r} and {round!r}")
        self.channels = int(channels)
        self.round = int(round)

    def __repr__(self) -> str:
        return (
            f"ChannelsPerRound(channels={self.channels!r}, round={self.round!r}, over={self.over!r}, "
            f"min_channels={self.min_channels!r}, round_to={self.round_to!r}, ignore={self.ignore!r})"
        )

    def _asks_for_removal(self) -> bool:
        return True

    def _limit(self, total: int) -> float:  # noqa: ARG002
        return self.channels * self.round


def _is_chain(group: Group) -> bool:
    """One layer, read by nothing or by layers that hand its channels on one by one: no addition ties it to others."""
    names = {layer.name for layer in group.layers}
    return sum(layer.reader not in names for layer in group.layers) <= 1
