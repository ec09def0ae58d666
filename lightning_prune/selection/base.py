"""What every selection shares: constraints, coupling, rounding to multiples, and the checks of scores."""

from __future__ import annotations

import copy
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, TypeVar, final

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_prune.errors import NoEffectWarning, PlanError, ScoreError
from lightning_prune.graph import ChannelGraph, Group
from lightning_prune.plan import Coupling, GroupPlan, Plan, check_coupling

Scores = Mapping[str, Tensor]
S = TypeVar("S", bound="Selection")
Kept = dict[str, dict[str, Tensor]]  # {group: {layer: (channels,)}}; under joint coupling the only layer is ''


@dataclass(frozen=True)
class Question:
    """What a selection has to decide on.

    Attributes:
        graph: the channel graph.
        groups: those that may lose channels.
        ranked: {group: {layer: score (channels,)}}; under joint coupling one entry per group, ''.
        plan: what a choice comes to, with ``min_channels``, ``round_to`` and the coupling applied.
        model: the traced model, if one was given.
        example_inputs: what it runs on.
    """

    graph: ChannelGraph
    groups: list[Group]
    ranked: Kept
    plan: Callable[[Kept], Plan]
    model: nn.Module | None = None
    example_inputs: Any = None


class Selection(ABC):
    """Chooses which channels stay.

    Attributes:
        needs_model: whether `select` has to be given the model and example inputs.

    Args:
        min_channels: channels that every group (every layer under union) keeps: a count, or a share in (0, 1).
        round_to: kept channels are rounded up to a multiple (8 fills SIMD lanes); the best of the condemned stay.
        ignore: name patterns (``layer4.*``); a group with a matching layer is left as it is.
    """

    needs_model: ClassVar[bool] = False

    def __init__(self, *, min_channels: float = 1, round_to: int = 1, ignore: Iterable[str] = ()) -> None:
        share = isinstance(min_channels, float) and 0 < min_channels < 1
        if not share and not is_count(min_channels):
            raise PlanError(f"min_channels must be a count >= 1 or a share in (0, 1), got {min_channels!r}")
        if not is_count(round_to):
            raise PlanError(f"round_to must be an integer >= 1, got {round_to!r}")
        self.min_channels = min_channels
        self.round_to = int(round_to)
        self.ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)

    def part(self, share: float) -> Self:  # noqa: ARG002
        """The same selection asked for a share, in (0, 1], of what it removes: a step of a ramp.

        Raises:
            PlanError: it cannot be asked for less.
        """
        raise PlanError(f"{self!r} cannot be spread over several steps; use LayerRatio, GlobalRatio or Budget")

    @final
    def select(
        self,
        graph: ChannelGraph,
        scores: Scores,
        *,
        coupling: Coupling = "joint",
        batch_norm: bool = True,
        model: nn.Module | None = None,
        example_inputs: Any = None,
    ) -> Plan:
        """The plan for these scores.

        Args:
            graph: from `lightning_prune.trace`.
            scores: from `lightning_prune.score`; plain ``{group: (channels,)}`` serves under joint coupling.
            coupling: ``joint``: a group's layers go together; ``union``: each layer chooses, and what any keeps
                survives; ``intersection``: what all keep survives (lossy, for comparison only).
            batch_norm: mask batch norms with their filters; False is lossy, for comparison only.
            model: the traced model; only a selection with ``needs_model`` looks at it, and leaves it as it is.
            example_inputs: as for `lightning_prune.trace`; for the same selections.

        Raises:
            PlanError: nothing to prune, an ignore pattern that matches nothing, an unknown coupling, or no model
                where one is needed.
            ScoreError: scores are missing, of wrong length, NaN or infinite.
        """
        question = self._question(graph, scores, coupling, batch_norm, model, example_inputs)
        plan = question.plan(self._kept(question))
        if self._asks_for_removal() and not plan:
            warnings.warn(f"{self!r} removes no channel of this model", NoEffectWarning, stacklevel=2)
        return plan

    @final
    def _question(
        self,
        graph: ChannelGraph,
        scores: Scores,
        coupling: Coupling,
        batch_norm: bool,
        model: nn.Module | None,
        example_inputs: Any,
    ) -> Question:
        check_coupling(coupling)
        if self.needs_model and (model is None or example_inputs is None):
            raise PlanError(f"{self!r} counts the pruned model: pass select(..., model=..., example_inputs=...)")
        groups = self._candidates(graph)
        ranked = {group.name: _rankings(group, scores, coupling) for group in groups}
        whole = {group.name: _ranking(group, "", scores[group.name]) for group in groups}

        def plan_of(kept: Kept) -> Plan:
            plans = {g.name: self._group_plan(g, whole[g.name], kept[g.name], coupling) for g in groups}
            return Plan(plans, coupling, batch_norm)

        return Question(graph, groups, ranked, plan_of, model, example_inputs)

    @abstractmethod
    def _kept(self, question: Question) -> Kept:
        """Which channels every ranked layer keeps, before rounding and coupling."""

    @abstractmethod
    def _asks_for_removal(self) -> bool:
        """Whether a plan that removes nothing is worth a warning."""

    def _candidates(self, graph: ChannelGraph) -> list[Group]:
        check_patterns("ignore", self.ignore, graph)
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
        kept = {name: mask.clone() for name, mask in kept.items()}
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


def changed(selection: S, **values: Any) -> S:
    """A copy with other values of some attributes."""
    other = copy.copy(selection)
    vars(other).update(values)
    return other


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


def check_patterns(what: str, patterns: Iterable[str], graph: ChannelGraph) -> None:
    """Refuse name patterns that match no layer.

    Raises:
        PlanError: with the pattern and the layers there are.
    """
    names = [layer.name for group in graph.groups for layer in group.layers]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise PlanError(f"{what}: no layer matches {pattern!r}; layers are {', '.join(names)}")


def is_count(value: object) -> bool:
    """A whole number of at least 1; a bool is none."""
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return whole and not isinstance(value, bool) and value >= 1  # type: ignore[operator]


def _indices(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero().flatten().tolist())
