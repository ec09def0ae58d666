"""What a plan was made on, so that it can be changed by layer: names, constraints, and who comes back first."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from lightning_prune.errors import PlanError
from lightning_prune.plan.group_plan import Coupling, GroupPlan

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_prune.graph import ChannelGraph, Group


@dataclass(frozen=True, eq=False)
class Basis:
    """The graph that names a plan's layers, and what a selection had to respect when it made the plan.

    Attributes:
        graph: of the dense model.
        scores: {group: (channels,)}; the best of the condemned come back where ``round_to`` asks for it.
        min_channels: a count, or a share in (0, 1), of the channels of every group that stays.
        round_to: kept channels are multiples of it.
        unwanted: {group: channels} that were removed by hand, which therefore do not come back by themselves.
    """

    graph: ChannelGraph
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    min_channels: float = 1
    round_to: int = 1
    unwanted: Mapping[str, frozenset[int]] = field(default_factory=dict)

    def groups_of(self, name: str, filters: Any = None) -> list[tuple[Group, str | None, set[int]]]:
        """Which channels of which groups belong to filters of a layer, or are named as channels of a group.

        Args:
            name: of a layer, or of a group that no layer has the name of (then the layer is None).
            filters: their numbers; None: all.

        Raises:
            PlanError: there is no such layer, or no such number.
        """
        parts = [(group, layer) for group in self.graph.groups for layer in group.layers if layer.name == name]
        if not parts:
            group = next((group for group in self.graph.groups if group.name == name), None)
            if group is None:
                raise PlanError(self._unknown(name))
            every = range(group.size)
            return [(group, None, set(every if filters is None else _numbers(name, filters, group.size)))]
        wanted = set(range(parts[0][1].filters) if filters is None else _numbers(name, filters, parts[0][1].filters))
        found: list[tuple[Group, str | None, set[int]]] = []
        seen: set[int] = set()
        for group, layer in parts:
            rows = layer.index.tolist()
            channels = {channel for channel, row in enumerate(rows) if not wanted.isdisjoint(row)}
            seen.update(*rows)
            if channels:
                found.append((group, layer.name, channels))
        if filters is not None and (lost := sorted(wanted - seen)):
            raise PlanError(f"filters {lost[:5]} of {name!r} belong to no group of channels: they cannot be removed")
        return found

    def matching(self, pattern: str) -> list[str]:
        """Layers of that name, in a module of that name, or that fit the pattern; else the group of that name.

        Raises:
            PlanError: there is none.
        """
        layers = dict.fromkeys(layer.name for group in self.graph.groups for layer in group.layers)
        found = [layer for layer in layers if matches(pattern, layer)]
        if not found and all(group.name != pattern for group in self.graph.groups):
            raise PlanError(self._unknown(pattern))
        return found or [pattern]

    def changed(
        self,
        group: Group,
        planned: GroupPlan | None,
        layer: str | None,
        channels: set[int],
        coupling: Coupling,
        *,
        stay: bool,
    ) -> GroupPlan:
        """The plan of a group of which these channels stay, or go, for one layer (under joint coupling for all).

        Raises:
            PlanError: the group cannot be pruned, or a constraint cannot be respected.
        """
        if planned is None:
            planned = GroupPlan.whole(group.size)
        own = {part.name: set(planned.kept_by(part.name)) for part in group.layers}
        for name in own if coupling == "joint" or layer is None else [layer]:
            own[name] = own[name] | channels if stay else own[name] - channels
        keep = (set.intersection if coupling == "intersection" else set.union)(*own.values())
        if keep == set(planned.keep) and all(own[name] == set(kept) for name, kept in planned.layers.items()):
            return planned
        if not group.prunable:
            raise PlanError(f"group {group.name!r} cannot be pruned: it {group.reason}")
        back = self._back(group, keep, set() if stay else channels)
        layers = {name: tuple(sorted(kept | back)) for name, kept in own.items()}
        return GroupPlan(group.size, tuple(sorted(keep | back)), layers)

    def remembering(self, group: str, channels: set[int], *, stay: bool) -> Basis:
        """The same after these channels were kept, or removed, by hand."""
        before = self.unwanted.get(group, frozenset())
        now = before - channels if stay else before | channels
        return replace(self, unwanted={**self.unwanted, group: now})

    def _back(self, group: Group, keep: set[int], gone: set[int]) -> set[int]:
        """Removed channels that have to stay, so that the constraints hold."""
        least = least_of(self.min_channels, group.size)
        if len(keep) < least:
            raise PlanError(
                f"group {group.name!r} would keep {len(keep)} of {group.size} channels, and at least {least} have to "
                "stay (min_channels)"
            )
        missing = rounded(len(keep), self.round_to, group.size) - len(keep)
        if not missing:
            return set()
        others = set(range(group.size)) - keep - gone - self.unwanted.get(group.name, frozenset())
        scores = self.scores.get(group.name)
        if scores is None or len(others) < missing:
            fewer = len(keep) % self.round_to
            way_out = f"remove {fewer} more" if len(keep) - fewer >= least else f"keep {missing} more"
            raise PlanError(
                f"group {group.name!r} would keep {len(keep)} of {group.size} channels, no multiple of "
                f"{self.round_to} (round_to): name them in one call, and {way_out}"
            )
        values = scores.tolist()
        return set(sorted(others, key=lambda channel: (-values[channel], channel))[:missing])

    def _unknown(self, name: str) -> str:
        """What is said of a name that no layer and no group has."""
        layers = {layer.name: layer.norm for group in self.graph.groups for layer in group.layers}
        normed = [layer for layer, norm in layers.items() if norm == name]
        if normed:
            return f"{name!r} is a batch norm: its channels are those of layer {normed[0]!r}"
        names = list(dict.fromkeys([*layers, *(group.name for group in self.graph.groups)]))
        close = difflib.get_close_matches(name, names, n=3)
        if close:
            return f"the model has no layer {name!r}; did you mean {' or '.join(map(repr, close))}?"
        more = f" and {len(names) - 12} more" if len(names) > 12 else ""
        return f"the model has no layer {name!r}; its layers are {', '.join(names[:12])}{more}"


def matches(pattern: str, layer: str) -> bool:
    """Whether a layer has that name, lies in a module of that name, or fits the pattern."""
    return layer == pattern or layer.startswith(f"{pattern}.") or fnmatchcase(layer, pattern)


def least_of(min_channels: float, size: int) -> int:
    """How many of ``size`` channels have to stay, by a count or a share in (0, 1)."""
    return min(size, math.ceil(min_channels * size) if min_channels < 1 else int(min_channels))


def rounded(count: int, round_to: int, size: int) -> int:
    """The next multiple from a count on; all channels are one always."""
    return min(size, math.ceil(count / round_to) * round_to)


def _numbers(name: str, given: Any, size: int) -> list[int]:
    """Channel numbers from an integer or several, of any library."""
    try:
        items = list(given) if isinstance(given, Iterable) and getattr(given, "ndim", 1) != 0 else [given]
        if any(isinstance(item, bool) or "bool" in str(getattr(item, "dtype", "")) for item in items):
            raise TypeError
        numbers = [operator.index(item) for item in items]
    except TypeError as error:
        raise PlanError(f"{name!r}: channels are named by their numbers, such as [0, 3], got {given!r}") from error
    outside = [number for number in numbers if not 0 <= number < size]
    if outside:
        raise PlanError(f"{name!r} has channels 0 to {size - 1}, got {', '.join(map(str, outside[:5]))}")
    return numbers
