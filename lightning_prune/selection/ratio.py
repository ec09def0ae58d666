"""The same share of every layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from lightning_prune.errors import PlanError
from lightning_prune.graph import ChannelGraph, Group
from lightning_prune.selection.base import Kept, Question, Selection, changed, check_patterns, check_ratio


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

    @override
    def part(self, share: float) -> LayerRatio:
        overrides = {pattern: share * ratio for pattern, ratio in self.overrides.items()}
        return changed(self, ratio=share * self.ratio, overrides=overrides)

    def _asks_for_removal(self) -> bool:
        return max(self.ratio, *self.overrides.values(), 0.0) > 0

    def _candidates(self, graph: ChannelGraph) -> list[Group]:
        check_patterns("overrides", self.overrides, graph)
        return super()._candidates(graph)

    def _ratio(self, group: Group, layer: str) -> float:
        names = [layer] if layer else [member.name for member in group.layers]
        return next((v for p, v in self.overrides.items() if any(fnmatchcase(n, p) for n in names)), self.ratio)

    def _kept(self, question: Question) -> Kept:
        return {
            group.name: {name: self._strongest(group, name, s) for name, s in question.ranked[group.name].items()}
            for group in question.groups
        }

    def _strongest(self, group: Group, layer: str, scores: Tensor) -> Tensor:
        size = len(scores)
        count = (round if self.rounding == "round" else math.floor)(self._ratio(group, layer) * size)
        mask = torch.ones(size, dtype=torch.bool)
        mask[torch.argsort(scores, stable=True)[: min(count, size - self._least(size))]] = False
        return mask
