"""A share of the channels: the same of every layer, or of the whole network, wherever the weakest are."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.errors import PlanError, check_choice
from lightning_prune.files import read_json, write_text
from lightning_prune.graph import ChannelGraph, Group
from lightning_prune.plan.basis import matches
from lightning_prune.selection.base import ByLayer, Question, Selection, check_ratio
from lightning_prune.selection.layer_names import LayerName, as_names, check_patterns, names_in

Over = Literal["all", "inner", "groups"]
Rounding = Literal["round", "floor"]
FORMAT = "lightning-prune-layer-ratios/1"
Key = Callable[[Group, Tensor], Tensor]


@final
@dataclass(repr=False, eq=False)
class LayerRatio(Selection):
    """The same share of every layer: removes ``round(ratio * channels)`` of each (per layer: PFEC, FPGM, LR).

    Args:
        ratio: share removed, in [0, 1).
        rounding: ``round`` (half to even, as the LR paper's code on ResNet) or ``floor`` (on YOLOv3).
        overrides: ratio by name, pattern or module, as ``ignore`` takes them, or by a group's name; the first match
            counts, and under joint coupling one matching layer is enough.
        min_channels, round_to, ignore: see `Selection`.

    Raises:
        PlanError: a ratio outside [0, 1); in `select` also a pattern of ``overrides`` that matches no layer.

    Example:
        >>> LayerRatio(0.5, overrides={"layer4.*": 0.7})
        LayerRatio(ratio=0.5, rounding='round', overrides={'layer4.*': 0.7}, min_channels=1, round_to=1, ignore=())
    """

    ratio: float = 0.5
    _: KW_ONLY
    rounding: Rounding = "round"
    overrides: Mapping[LayerName, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("rounding", self.rounding, Rounding, PlanError)
        if isinstance(self.ratio, Mapping):
            raise PlanError(
                "ratio is one number, for the layers that nothing else is said of; ratios of single layers go to "
                f"overrides: LayerRatio(0.5, overrides={self.ratio!r})"
            )
        self.ratio = check_ratio(self.ratio)
        if not isinstance(self.overrides, Mapping):
            raise PlanError(f"overrides takes ratios by layer, {{'layer4.*': 0.7}}, got {self.overrides!r}")
        as_names("overrides", self.overrides)
        self.overrides = {pattern: check_ratio(ratio) for pattern, ratio in self.overrides.items()}

    @override
    def named(self, model: nn.Module | None) -> LayerRatio:
        found: dict[LayerName, float] = {}
        for given, ratio in self.overrides.items():
            for name in names_in("overrides", given, model):
                found.setdefault(name, ratio)
        changed = super().named(model)
        return changed if found == self.overrides else replace(changed, overrides=found)

    @override
    def part(self, share: float) -> LayerRatio:
        overrides = {pattern: share * ratio for pattern, ratio in self.overrides.items()}
        return replace(self, ratio=share * self.ratio, overrides=overrides)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ratio and overrides as JSON, which `lightning-prune prune --layer-ratios` reads too.

        Raises:
            PlanError: modules among the overrides; use `named` first.
            PruningError: the file cannot be written.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     LayerRatio(0.0, overrides={"conv1": 0.5}).save(f"{folder}/ratios.json")
            ...     LayerRatio.load(f"{folder}/ratios.json", round_to=8).overrides
            {'conv1': 0.5}
        """
        if not all(isinstance(name, str) for name in self.overrides):
            raise PlanError("overrides by module cannot be written: LayerRatio.named(model) has their names")
        content = {"format": FORMAT, "ratio": self.ratio, "rounding": self.rounding, "overrides": self.overrides}
        write_text(Path(path), f"{json.dumps(content, indent=1)}\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str], **constraints: Any) -> LayerRatio:
        """Read what `save` wrote; ``constraints`` are those of `Selection`.

        Raises:
            PlanError: there is no such file, or it holds no ratios.
        """
        data = read_json(path, PlanError, "file of layer ratios")
        if data.get("format") != FORMAT:
            raise PlanError(f"{path} holds no ratios of layers of format {FORMAT}; name a file of sensitivity --drop")
        try:
            given = {name: data[name] for name in ("ratio", "rounding", "overrides")}
            return cls(**given, **constraints)
        except KeyError as error:
            raise PlanError(f"{path} is not complete: there is no {error}; write it again") from error
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error

    def _asks_for_removal(self) -> bool:
        return max(self.ratio, *self.overrides.values(), 0.0) > 0

    def _candidates(self, graph: ChannelGraph) -> list[Group]:
        shared = _sharing_a_layer(graph)
        check_patterns("overrides", (name for name in self.overrides if name not in shared), graph)
        return super()._candidates(graph)

    def _kept(self, question: Question) -> ByLayer:
        shared = _sharing_a_layer(question.graph)
        return {
            group.name: {
                name: self._strongest(group, name, scores, shared)
                for name, scores in question.ranked[group.name].items()
            }
            for group in question.groups
        }

    def _strongest(self, group: Group, layer: str, scores: Tensor, shared: Collection[str]) -> Tensor:
        names = [layer] if layer else [member.name for member in group.layers]
        matching = (
            ratio
            for pattern, ratio in self.overrides.items()
            if (pattern == group.name if pattern in shared else any(matches(str(pattern), name) for name in names))
        )
        wanted = next(matching, self.ratio) * group.size
        count = round(wanted) if self.rounding == "round" else math.floor(wanted)
        mask = torch.ones(group.size, dtype=torch.bool)
        mask[torch.argsort(scores, stable=True)[: min(count, group.size - self._least(group.size))]] = False
        return mask


@final
@dataclass(repr=False, eq=False)
class GlobalRatio(Selection):
    """The weakest share over the whole network, wherever they are (JRE, Taylor, BN scale).

    Args:
        ratio: share removed, in [0, 1).
        over: what the share is of: ``all`` filters of all prunable layers, ``groups``: every channel of a group
            counts once, ``inner``: only layers that feed no addition are candidates (JRE's ResNet setting), that is
            groups of one layer and the depthwise convolutions behind it.
        min_channels, round_to, ignore: see `Selection`.

    Raises:
        PlanError: a ratio outside [0, 1), or unknown ``over``; in `select` also if it leaves no candidate.

    Example:
        >>> GlobalRatio(0.5)
        GlobalRatio(ratio=0.5, over='all', min_channels=1, round_to=1, ignore=())
    """

    ratio: float = 0.5
    _: KW_ONLY
    over: Over = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("over", self.over, Over, PlanError)
        self.ratio = check_ratio(self.ratio)

    @override
    def part(self, share: float) -> GlobalRatio:
        return replace(self, ratio=share * self.ratio)

    def total(self, graph: ChannelGraph) -> int:
        """How many channels there are, counted as ``over`` says.

        Raises:
            PlanError: nothing to prune.
        """
        return sum(group.size * self._filters(group, "") for group in self._candidates(graph))

    def _asks_for_removal(self) -> bool:
        return self.ratio > 0

    def _candidates(self, graph: ChannelGraph) -> list[Group]:
        groups = super()._candidates(graph)
        if self.over == "inner":
            groups = [group for group in groups if _is_chain(group)]
            if not groups:
                raise PlanError("over='inner': every prunable layer feeds an addition; use over='all' or 'groups'")
        return groups

    def _kept(self, question: Question) -> ByLayer:
        ranking = Ranking(question, self._least)
        filters = torch.tensor([self._filters(group, name) for group, name in ranking.layers])
        sizes = torch.tensor([group.size for group, _ in ranking.layers])
        gone = filters[ranking.owners].cumsum(0)
        return ranking.kept(int((gone <= self.ratio * int(filters @ sizes) + 1e-9).sum()))

    def _filters(self, group: Group, layer: str) -> int:
        """How many one channel counts for."""
        if self.over == "groups":
            return 1
        layers = [group.layer(layer)] if layer else group.layers
        return sum(member.index.shape[1] for member in layers)


def _sharing_a_layer(graph: ChannelGraph) -> set[str]:
    """Groups named ``conv1[0:4]``, after a part of a layer's filters: for `matches` the brackets are a pattern."""
    return {group.name for group in graph.groups if group.name != group.layers[0].name}


def _is_chain(group: Group) -> bool:
    """One layer, read by nothing or by layers that hand its channels on one by one: no addition ties it to others."""
    names = {layer.name for layer in group.layers}
    return sum(layer.reader not in names for layer in group.layers) <= 1


class Ranking:
    """The channels that may go, weakest first, ties in the network's order; none that ``min_channels`` keeps.

    ``key`` makes the scores of a group comparable with those of others, and leaves their order within it.
    """

    def __init__(self, question: Question, least: Callable[[int], int], key: Key = lambda _, scores: scores) -> None:
        self.layers = [(group, name) for group in question.groups for name in question.ranked[group.name]]
        scores = [key(group, question.ranked[group.name][name]) for group, name in self.layers]
        self._sizes = list(map(len, scores))
        free = [values.argsort(stable=True).argsort() < len(values) - least(len(values)) for values in scores]
        ranked = torch.cat(scores).argsort(stable=True)
        self._positions = ranked[torch.cat(free)[ranked]]
        layers = torch.repeat_interleave(torch.arange(len(scores)), torch.tensor(self._sizes))
        self.owners = layers[self._positions]  # (steps,): which of the layers loses a channel

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
