"""Selection: from scores to a plan, under a ratio and constraints."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_prune.errors import NoEffectWarning, PlanError, ScoreError
from lightning_prune.graph import ChannelGraph, Group
from lightning_prune.plan import Coupling, GroupPlan, Plan, check_coupling

Over = Literal["all", "inner", "groups"]
Scores = Mapping[str, Tensor]


class Selection(ABC):
    """Chooses which channels stay.

    Args:
        min_channels: channels that every group (every layer under union) keeps: a count, or a share in (0, 1).
        round_to: kept channels are rounded up to a multiple (8 fills SIMD lanes); the best of the condemned stay.
        ignore: name patterns (``layer4.*``); a group with a matching layer is left as it is.
    """

    def __init__(self, *, min_channels: float = 1, round_to: int = 1, ignore: Iterable[str] = ()) -> None:
        share = isinstance(min_channels, float) and 0 < min_channels < 1
        if not share and not _is_count(min_channels):
            raise PlanError(f"min_channels must be a count >= 1 or a share in (0, 1), got {min_channels!r}")
        if not _is_count(round_to):
            raise PlanError(f"round_to must be an integer >= 1, got {round_to!r}")
        self.min_channels = min_channels
        self.round_to = int(round_to)
        self.ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)

    def select(
        self, graph: ChannelGraph, scores: Scores, *, coupling: Coupling = "joint", batch_norm: bool = True
    ) -> Plan:
        """The plan for these scores.

        Args:
            graph: from `lightning_prune.trace`.
            scores: from `lightning_prune.score`; plain ``{group: (channels,)}`` serves under joint coupling.
            coupling: ``joint``: a group's layers go together; ``union``: each layer chooses, and what any keeps
                survives; ``intersection``: what all keep survives (lossy, for comparison only).
            batch_norm: mask batch norms with their filters; False is lossy, for comparison only.

        Raises:
            PlanError: nothing to prune, an ignore pattern that matches nothing, or an unknown coupling.
            ScoreError: scores are missing, of wrong length, NaN or infinite.
        """
        check_coupling(coupling)
        groups = self._candidates(graph)
        ranked = {group.name: _rankings(group, scores, coupling) for group in groups}
        kept = self._kept(groups, ranked)
        plans = {
            group.name: self._group_plan(group, _ranking(group, "", scores[group.name]), kept[group.name], coupling)
            for group in groups
        }
        plan = Plan(plans, coupling, batch_norm)
        if self._asks_for_removal() and not plan:
            warnings.warn(f"{self!r} removes no channel of this model", NoEffectWarning, stacklevel=2)
        return plan

    @abstractmethod
    def _kept(self, groups: list[Group], ranked: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """{group: {layer: bool (channels,)}} from {group: {layer: score (channels,)}}; joint: one entry, ''."""

    @abstractmethod
    def _asks_for_removal(self) -> bool:
        """Whether a plan that removes nothing is worth a warning."""

    def _candidates(self, graph: ChannelGraph) -> list[Group]:
        _check_patterns("ignore", self.ignore, graph)
        groups = [
            group
            for group in graph.prunable_groups
            if not any(fnmatchcase(layer.name, pattern) for layer in group.layers for pattern in self.ignore)
        ]
        if not groups:
            reasons = (
                "; ".join(f"{g.name} {g.reason or 'is ignored'}" for g in graph.groups) or "it has no layer to prune"
            )
            raise PlanError(f"nothing to prune in this model: {reasons}")
        return groups

    def _least(self, size: int) -> int:
        """How many of ``size`` channels have to stay."""
        least = math.ceil(self.min_channels * size) if self.min_channels < 1 else int(self.min_channels)
        return min(size, least)

    def _group_plan(self, group: Group, scores: Tensor, kept: dict[str, Tensor], coupling: Coupling) -> GroupPlan:
        own = {layer.name: kept.get(layer.name, kept.get("")) for layer in group.layers}
        masks = [mask for mask in own.values() if mask is not None]
        together = torch.stack(masks)
        keep = together.all(0) if coupling == "intersection" else together.any(0)
        # Layers that each keep enough may have too few in common.
        least = max(int(keep.sum()), self._least(group.size))
        target = min(group.size, math.ceil(least / self.round_to) * self.round_to)
        missing = target - int(keep.sum())
        if missing:
            condemned = torch.where(keep, torch.inf, -scores)
            back = torch.argsort(condemned, stable=True)[:missing]
            keep[back] = True
            for mask in masks:
                mask[back] = True
        members = {name: _indices(mask) for name, mask in own.items() if mask is not None}
        return GroupPlan(group.size, _indices(keep), members)


class LayerRatio(Selection):
    """The same share of every layer: removes ``round(ratio * channels)`` of each (per layer: PFEC, FPGM, LR).

    Args:
        ratio: share removed, in [0, 1).
        rounding: ``round`` (half to even, as the LR paper's code on ResNet) or ``floor`` (on YOLOv3).
        overrides: ratio by name pattern, the first match counts; under joint coupling one matching layer is enough.
        min_channels: see `Selection`.
        round_to: see `Selection`.
        ignore: see `Selection`.

    Raises:
        PlanError: a ratio outside [0, 1); in `select` also a pattern of ``overrides`` that matches no layer.

    Example:
        >>> LayerRatio(0.5, overrides={"layer4.*": 0.7})
        LayerRatio(ratio=0.5, rounding='round', overrides={'layer4.*': 0.7}, min_channels=1, round_to=1, ignore=())
    """

    def __init__(
        self,
        ratio: float = 0.5,
        *,
        rounding: Literal["round", "floor"] = "round",
        overrides: Mapping[str, float] | None = None,
        min_channels: float = 1,
        round_to: int = 1,
        ignore: Iterable[str] = (),
    ) -> None:
        super().__init__(min_channels=min_channels, round_to=round_to, ignore=ignore)
        if rounding not in ("round", "floor"):
            raise PlanError(f"rounding must be 'round' or 'floor', got {rounding!r}")
        self.ratio = check_ratio(ratio)
        self.rounding = rounding
        self.overrides = {pattern: check_ratio(value) for pattern, value in (overrides or {}).items()}

    def __repr__(self) -> str:
        return (
            f"LayerRatio(ratio={self.ratio!r}, rounding={self.rounding!r}, overrides={self.overrides!r}, "
            f"min_channels={self.min_channels!r}, round_to={self.round_to!r}, ignore={self.ignore!r})"
        )

    def _asks_for_removal(self) -> bool:
        return max(self.ratio, *self.overrides.values(), 0.0) > 0

    def _candidates(self, graph: ChannelGraph) -> list[Group]:
        _check_patterns("overrides", self.overrides, graph)
        return super()._candidates(graph)

    def _ratio(self, group: Group, layer: str) -> float:
        names = [layer] if layer else [member.name for member in group.layers]
        return next((v for p, v in self.overrides.items() if any(fnmatchcase(n, p) for n in names)), self.ratio)

    def _kept(self, groups: list[Group], ranked: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        return {
            group.name: {name: self._strongest(group, name, s) for name, s in ranked[group.name].items()}
            for group in groups
        }

    def _strongest(self, group: Group, layer: str, scores: Tensor) -> Tensor:
        size = len(scores)
        count = (round if self.rounding == "round" else math.floor)(self._ratio(group, layer) * size)
        mask = torch.ones(size, dtype=torch.bool)
        mask[torch.argsort(scores, stable=True)[: min(count, size - self._least(size))]] = False
        return mask


class GlobalRatio(Selection):
    """The weakest share over the whole network, wherever they are (JRE, Taylor, BN scale).

    Args:
        ratio: share removed, in [0, 1).
        over: what the share is of: ``all`` filters of all prunable layers, ``groups``: every channel of a group
            counts once, ``inner``: only layers that feed no addition are candidates (JRE's ResNet setting), that is
            groups of one layer and the depthwise convolutions behind it.
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
        super().__init__(min_channels=min_channels, round_to=round_to, ignore=ignore)
        if over not in get_args(Over):
            raise PlanError(f"over must be one of {', '.join(get_args(Over))}, got {over!r}")
        self.ratio = check_ratio(ratio)
        self.over = over

    def __repr__(self) -> str:
        return (
            f"GlobalRatio(ratio={self.ratio!r}, over={self.over!r}, min_channels={self.min_channels!r}, "
            f"round_to={self.round_to!r}, ignore={self.ignore!r})"
        )

    def _asks_for_removal(self) -> bool:
        return self.ratio > 0

    def _candidates(self, graph: ChannelGraph) -> list[Group]:
        groups = super()._candidates(graph)
        if self.over == "inner":
            groups = [group for group in groups if _is_chain(group)]
            if not groups:
                raise PlanError("over='inner': every prunable layer feeds an addition; use over='all' or 'groups'")
        return groups

    def _kept(self, groups: list[Group], ranked: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        kept = {
            group.name: {name: torch.ones(group.size, dtype=torch.bool) for name in ranked[group.name]}
            for group in groups
        }
        entries = [
            (group, name, channel) for group in groups for name in ranked[group.name] for channel in range(group.size)
        ]
        scores = torch.cat([ranked[group.name][name] for group in groups for name in ranked[group.name]])
        cost = {(group.name, name): self._cost(group, name) for group in groups for name in ranked[group.name]}
        budget = self.ratio * sum(cost[group.name, name] for group, name, _ in entries)
        room = {(g.name, name): g.size - self._least(g.size) for g in groups for name in ranked[g.name]}
        removed = 0
        for position in torch.argsort(scores, stable=True).tolist():
            group, name, channel = entries[position]
            key = (group.name, name)
            if not room[key]:
                continue
            if removed + cost[key] > budget + 1e-9:
                break
            room[key] -= 1
            removed += cost[key]
            kept[group.name][name][channel] = False
        return kept

    def total(self, graph: ChannelGraph) -> int:
        """How many channels the ratio is a share of.

        Raises:
            PlanError: nothing to prune.
        """
        return sum(group.size * self._cost(group, "") for group in self._candidates(graph))

    def _cost(self, group: Group, layer: str) -> int:
        """How many channels one channel counts for."""
        if self.over == "groups":
            return 1
        layers = [group.layer(layer)] if layer else group.layers
        return sum(member.index.shape[1] for member in layers)


def check_ratio(ratio: float) -> float:
    """Refuse a ratio outside [0, 1).

    Raises:
        PlanError: with the value.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
        raise PlanError(f"ratio is the share of channels to remove and must be in [0, 1), got {ratio!r}")
    return float(ratio)


def _rankings(group: Group, scores: Scores, coupling: Coupling) -> dict[str, Tensor]:
    """{'': group score} under joint coupling, {layer: its own score} else; checked."""
    if group.name not in scores:
        raise ScoreError(f"no scores for group {group.name!r}")
    if coupling == "joint":
        return {"": _ranking(group, "", scores[group.name])}
    layers = getattr(scores, "layers", None)
    if layers is None:
        raise ScoreError(f"coupling={coupling!r} needs scores per layer; use the result of lightning_prune.score")
    members = layers.get(group.name, {})
    missing = [layer.name for layer in group.layers if layer.name not in members]
    if missing:
        raise ScoreError(f"no scores for layer {missing[0]!r} of group {group.name!r}")
    return {layer.name: _ranking(group, layer.name, members[layer.name]) for layer in group.layers}


def _ranking(group: Group, layer: str, values: Tensor) -> Tensor:
    """Scores of a group, or of one of its layers, checked: (channels,) float64 on the CPU."""
    title = f"group {group.name!r}" + (f", layer {layer!r}" if layer else "")
    if not isinstance(values, Tensor):
        raise ScoreError(f"{title}: expected a tensor of {group.size} scores, got {type(values).__name__}")
    if values.shape != (group.size,):
        raise ScoreError(f"{title}: expected {group.size} scores, got shape {list(values.shape)}")
    if not bool(values.isfinite().all()):
        raise ScoreError(f"{title}: {int((~values.isfinite()).sum())} scores are NaN or infinite")
    return values.detach().double().cpu()


def _check_patterns(what: str, patterns: Iterable[str], graph: ChannelGraph) -> None:
    names = [layer.name for group in graph.groups for layer in group.layers]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise PlanError(f"{what}: no layer matches {pattern!r}; layers are {', '.join(names)}")


def _is_chain(group: Group) -> bool:
    """One layer, read by nothing or by layers that hand its channels on one by one: no addition ties it to others."""
    names = {layer.name for layer in group.layers}
    return sum(layer.reader not in names for layer in group.layers) <= 1


def _is_count(value: object) -> bool:
    """A whole number of at least 1; a bool is none."""
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return whole and not isinstance(value, bool) and value >= 1  # type: ignore[operator]


def _indices(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero().flatten().tolist())
