"""What every selection shares: constraints, coupling, rounding to multiples, and the checks of scores."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lightning_prune.errors import NoEffectWarning, PlanError, ScoreError
from lightning_prune.graph import ChannelGraph, Group
from lightning_prune.graph.describe import nothing_to_prune
from lightning_prune.plan import Basis, Coupling, GroupPlan, Plan, check_coupling
from lightning_prune.plan.basis import least_of, matches, rounded
from lightning_prune.selection.layer_names import LayerName, as_names, check_patterns, names_in

ByLayer = dict[str, dict[str, Tensor]]  # {group: {layer: (channels,)}}; under joint coupling the only layer is ""


@dataclass
class Question:
    """What a selection has to decide on.

    Attributes:
        graph, scores, coupling, batch_norm, model, example_inputs: as `Selection.select` takes them.
        groups: those that may lose channels.
        whole: {group: score (channels,)}, of all its layers together.
        ranked: the scores by which channels are chosen.
    """

    graph: ChannelGraph
    groups: list[Group]
    scores: Mapping[str, Tensor]
    coupling: Coupling
    batch_norm: bool
    model: nn.Module | None
    example_inputs: Any

    def __post_init__(self) -> None:
        check_coupling(self.coupling)
        self.whole = {g.name: _rankable(self.scores.get(g.name), f"group {g.name!r}", g.size) for g in self.groups}
        self.ranked: ByLayer = {name: {"": values} for name, values in self.whole.items()}
        if self.coupling == "joint":
            return
        by_layer = getattr(self.scores, "layers", None)
        if by_layer is None:
            raise ScoreError(
                f"coupling={self.coupling!r} needs scores per layer; use the result of lightning_prune.score"
            )
        for group in self.groups:
            found, title = by_layer.get(group.name, {}), f"of group {group.name!r}"
            names = [layer.name for layer in group.layers]
            self.ranked[group.name] = {k: _rankable(found.get(k), f"layer {k!r} {title}", group.size) for k in names}


@dataclass(repr=False, eq=False, kw_only=True)
class Selection(ABC):
    """Chooses which channels stay, under constraints that hold whatever is chosen.

    A selection of your own is a dataclass, too, that implements ``_kept``.

    Attributes:
        needs_model: whether `select` has to be given the model and example inputs.

    Args:
        min_channels: channels that every group (every layer under union) keeps: a count, or a share in (0, 1).
        round_to: kept channels are rounded up to a multiple (8 fills SIMD lanes); the best of the condemned stay.
        ignore: layers, by name, by pattern (``layer4.*``) or as modules; of a module around some, all inside. A group
            with one of them is left as it is.

    Raises:
        PlanError: a constraint that makes no sense.
    """

    needs_model: ClassVar[bool] = False

    min_channels: float = 1
    round_to: int = 1
    ignore: LayerName | Iterable[LayerName] = ()

    def __post_init__(self) -> None:
        share = isinstance(self.min_channels, float) and 0 < self.min_channels < 1
        if not share and not is_count(self.min_channels):
            raise PlanError(f"min_channels must be a count >= 1 or a share in (0, 1), got {self.min_channels!r}")
        if not is_count(self.round_to):
            raise PlanError(f"round_to must be an integer >= 1, got {self.round_to!r}")
        self.round_to = int(self.round_to)
        self.ignore = as_names("ignore", self.ignore)

    def __repr__(self) -> str:
        shared = {field.name for field in fields(Selection)}
        names = sorted((field.name for field in fields(self)), key=shared.__contains__)  # its own come first
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    def part(self, share: float) -> Self:  # noqa: ARG002
        """The same selection asked for a share, in (0, 1], of what it removes: a step of a ramp.

        Raises:
            PlanError: it cannot be asked for less.
        """
        raise PlanError(f"{self!r} cannot be spread over several steps; use LayerRatio, GlobalRatio or Budget")

    def named(self, model: nn.Module | None) -> Self:
        """The same selection with the names of its modules in this model, which hold in its copies too.

        Raises:
            PlanError: a module that is not in the model, or any if there is no model.
        """
        ignored = as_names("ignore", self.ignore)
        names = tuple(name for item in ignored for name in names_in("ignore", item, model))
        return self if names == ignored else replace(self, ignore=names)

    @property
    def measures_time(self) -> bool:
        """Whether it times models, so that it may choose otherwise when it is asked again."""
        return False

    @final
    def select(
        self,
        graph: ChannelGraph,
        scores: Mapping[str, Tensor],
        *,
        coupling: Coupling = "joint",
        batch_norm: bool = True,
        model: nn.Module | None = None,
        example_inputs: Any = None,
    ) -> Plan:
        """Choose the channels that stay: the plan for these scores.

        Args:
            graph: from `lightning_prune.trace`.
            scores: from `lightning_prune.score`; plain ``{group: (channels,)}`` serves under joint coupling.
            coupling: ``joint``: a group's layers go together; ``union``: each layer chooses, and what any keeps
                survives; ``intersection``: what all keep survives (lossy, for comparison only).
            batch_norm: mask batch norms with their filters; False is lossy, for comparison only.
            model: the traced model, left as it is; a selection with ``needs_model`` looks at it, and one that was
                given modules.
            example_inputs: as for `lightning_prune.trace`; for the same selections.

        Raises:
            PlanError: nothing to prune, an ignore pattern that matches nothing, an unknown coupling, or no model
                where one is needed.
            ScoreError: scores are missing, of wrong length, NaN or infinite.

        Example:
            >>> import lightning_prune as lp
            >>> graph = lp.trace(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.zeros(1, 3))
            >>> plan = lp.LayerRatio(0.5).select(graph, {"0": torch.tensor([0.3, 2.0, 0.1, 5.0])})
            >>> plan.groups["0"].keep
            (1, 3)
        """
        if (named := self.named(model)) is not self:
            return named.select(
                graph, scores, coupling=coupling, batch_norm=batch_norm, model=model, example_inputs=example_inputs
            )
        question = Question(graph, self._candidates(graph), scores, coupling, batch_norm, model, example_inputs)
        if not question.groups:
            return Plan({}, coupling, batch_norm, Basis(graph, {}, self.min_channels, self.round_to))
        plan = self._plan(question, self._kept(question))
        if self._asks_for_removal() and not plan:
            warnings.warn(f"{self!r} removes no channel of this model", NoEffectWarning, stacklevel=2)
        return plan

    @abstractmethod
    def _kept(self, question: Question) -> ByLayer:
        """Which channels every ranked layer keeps, as masks, before rounding and coupling."""

    def _asks_for_removal(self) -> bool:
        """Whether a plan that removes nothing is worth a warning."""
        return True

    def _candidates(self, graph: ChannelGraph) -> list[Group]:
        ignored = check_patterns("ignore", as_names("ignore", self.ignore), graph)
        groups = [
            group
            for group in graph.prunable_groups
            if not any(matches(pattern, layer.name) for layer in group.layers for pattern in ignored)
        ]
        if not groups:
            message = f"nothing to prune in this model: {nothing_to_prune(graph.groups, graph.notes)}"
            # What other inputs or sizes may need stays without an error, unless a cost has to be met.
            if self.needs_model or not any(group.withheld for group in graph.groups):
                raise PlanError(message)
            warnings.warn(message, NoEffectWarning, stacklevel=3)
        return groups

    @final
    def _plan(self, question: Question, kept: ByLayer) -> Plan:
        """What a choice comes to, with the constraints and the coupling applied."""
        plans = {group.name: self._group_plan(group, question, kept[group.name]) for group in question.groups}
        basis = Basis(question.graph, question.whole, self.min_channels, self.round_to)
        return Plan(plans, question.coupling, question.batch_norm, basis)

    def _group_plan(self, group: Group, question: Question, kept: dict[str, Tensor]) -> GroupPlan:
        own = {layer.name: kept[layer.name if layer.name in kept else ""] for layer in group.layers}
        masks = torch.stack(list(own.values()))  # (layers, channels)
        keep = masks.all(0) if question.coupling == "intersection" else masks.any(0)
        # Layers that each keep enough may have too few in common.
        least = max(int(keep.sum()), self._least(group.size))
        target = rounded(least, self.round_to, group.size)
        condemned = torch.where(keep, torch.inf, -question.whole[group.name])
        back = torch.argsort(condemned, stable=True)[: target - int(keep.sum())]
        keep[back] = masks[:, back] = True
        return GroupPlan.of_masks(keep, dict(zip(own, masks, strict=True)))

    def _least(self, size: int) -> int:
        """How many of ``size`` channels have to stay."""
        return least_of(self.min_channels, size)


def _rankable(values: object, title: str, size: int) -> Tensor:
    """Scores as float64 on the CPU, (channels,); ``title`` says whose they are."""
    if values is None:
        raise ScoreError(f"no scores for {title}")
    if not isinstance(values, Tensor):
        raise ScoreError(f"{title}: expected a tensor of {size} scores, got {type(values).__name__}")
    if values.shape != (size,):
        raise ScoreError(f"{title}: expected {size} scores, got shape {list(values.shape)}")
    if not bool(values.isfinite().all()):
        raise ScoreError(f"{title}: {int((~values.isfinite()).sum())} scores are NaN or infinite")
    return values.detach().double().cpu()


def check_ratio(ratio: float) -> float:
    """The ratio, unless it lies outside [0, 1)."""
    if not is_number(ratio) or not 0 <= ratio < 1:
        raise PlanError(f"ratio is the share of channels to remove and must be in [0, 1), got {ratio!r}")
    return float(ratio)


def is_number(value: object) -> bool:
    """An integer or a float; a bool is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_count(value: Any) -> bool:
    """A whole number of at least 1; a bool is none."""
    return is_number(value) and value >= 1 and float(value).is_integer()
