"""What a criterion is: which tensors it wants to see, and how it turns what was seen into scores.

A criterion holds its settings and nothing else; sums over batches live in the `Scorer`. One instance can
therefore score several models, be pickled, compared, and written into a checkpoint.
"""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, final, get_origin, get_type_hints

import torch
from torch import Tensor

from lightning_prune.criteria import functional
from lightning_prune.errors import ScoreError, check_choice, did_you_mean
from lightning_prune.graph.groups import Layer

Site = Literal["conv", "bn", "activation"]
TapSite = Literal["conv", "bn", "activation", "rectifier", "weight", "reader", "reader_weight", "reader_rows"]
Missing = Literal["refuse", "keep"]


class Tap(ABC):
    """One quantity that a criterion sums over batches at one site of every layer.

    Attributes:
        name: key of the sums; distinct within a criterion.
        site: ``conv``: output of the layer. ``bn``: output of its batch norm, else of the layer.
            ``activation``: the tensor that enters the first layer that reads the channels.
            ``rectifier``: output of the first rectifier (ReLU and its kin) behind the layer.
            ``weight``: the layer's weight; filters are F, one sample, the entries of a filter are M.
            ``reader``: by how much the output of a layer that reads the channels changes without each of them
            (F are channels, M all outputs of a sample), with the gradient at that output; readers add up.
            ``reader_weight``: as ``weight``, with the inputs of a layer that reads the channels as F.
            ``reader_rows``: by how much outputs, drawn at random, of a layer that reads the channels change without
            each of them; `partial` sees (rows, channels) and returns (channels, channels).
        gradient: wants the gradient of the loss with respect to the tensor too.
        reference: looks at the frozen dense model instead of the current one.
        degree: power of the gradient in `partial`, so that it can be rescaled.
        optional: a layer may lack the site; its `Member` then has no mean of that name.
        chunk: at site ``reader``, how many channels are held at once.
        joint: one sum for all layers of a group, (channels, width). At site ``reader_weight``, `partial` then
            returns (F, M), and all entries of all readers of a channel follow one another.
        rows: at site ``reader_rows``, outputs drawn per sample; None: all.
        seed: at site ``reader_rows``, of the draw.
    """

    name: str
    site: TapSite
    gradient: bool = False
    reference: bool = False
    degree: int = 1
    optional: bool = False
    chunk: int = 8
    joint: bool = False
    rows: int | None = None
    seed: int = 0

    @abstractmethod
    def partial(self, value: Tensor, gradient: Tensor | None) -> Tensor:
        """Sum over positions, (N, F, M) to (N, F) float64, additive over calls of a module.

        ``gradient`` is that of the user's loss, taken to average over samples. The scorer multiplies the
        result by N ** degree: the gradient of the sum of per-sample losses, which no split into batches
        changes.
        """

    def reduce(self, partial: Tensor, positions: int) -> tuple[Tensor, int]:  # noqa: ARG002
        """Sum (N, channels) over one batch.

        Args:
            partial: what the calls of the module and the filters of a channel add up to.
            positions: positions per filter and sample, over all calls.

        Returns:
            The sum (channels,), and what to divide it by in the end; unless overridden, the number of samples.
        """
        return partial.sum(0), len(partial)

    def scores(self, members: Sequence[Member]) -> list[Tensor]:
        """What the channels of every layer are worth by this quantity alone, before normalisation."""
        return [member.means[self.name] for member in members]


@dataclass(frozen=True)
class Member:
    """One layer of a group, with what was seen of it.

    Attributes:
        group: name of its channel group.
        layer: the layer.
        weight: what it computes with, in the model's layout (under weight norm, say, not what that is made from).
        means: per tap, mean over samples or batches, (channels,) float64; (channels, width) for `Tap.joint`.
        scales: gamma of every batch norm that normalises the channels, (channels, k); see `batch_norm_scales`.
    """

    group: str
    layer: Layer
    weight: Tensor
    means: Mapping[str, Tensor] = field(default_factory=dict)
    scales: tuple[Tensor, ...] = ()

    def rows(self) -> Tensor:
        """Weights of each channel as one vector, (channels, fan) float64."""
        return functional.channel_rows(self.weight, self.layer.dim, self.layer.index)

    def blocks(self) -> Iterator[Tensor]:
        """`rows` some channels at a time: large layers take a tenth of the time, and next to no memory."""
        return functional.channel_blocks(self.weight, self.layer.dim, self.layer.index)


class Criterion(ABC):
    """Importance of channels; high means keep.

    Subclasses are frozen dataclasses with keyword fields, their settings: so they compare, pickle, and show themselves
    as the code that makes them; values that a field's ``Literal`` type does not list are refused. They implement
    `scores`; those that look at data also return their `taps`. docs/own-criterion.md has a worked example.

    Attributes:
        combine: how member layers of a group share one score: ``mean`` (default: stays on the scale of one
            layer, where a sum would favour groups with many members), ``sum`` or ``max``.
    """

    combine: functional.Combine | Literal["first"] = "mean"

    def __post_init__(self) -> None:
        """Refuse values that a field's ``Literal`` does not list; extend it where types do not say all."""
        for name, hint in get_type_hints(type(self)).items():
            if get_origin(hint) is Literal:
                check_choice(name, getattr(self, name), hint, ScoreError)

    @property
    def taps(self) -> tuple[Tap, ...]:
        """What it sums over batches; empty when weights are enough."""
        return ()

    @property
    def auxiliary(self) -> tuple[int, float]:
        """Number and weight of auxiliary classifiers whose losses are added, see `DCP`."""
        return 0, 0.0

    @abstractmethod
    def scores(self, members: Sequence[Member]) -> list[Tensor]:
        """One float64 tensor (channels,) per member."""

    @property
    @final
    def needs_forward(self) -> bool:
        """Whether the model has to run on data."""
        return bool(self.taps)

    @property
    @final
    def needs_backward(self) -> bool:
        """Whether a loss is needed."""
        return any(tap.gradient for tap in self.taps)

    @property
    @final
    def needs_fitting(self) -> bool:
        """Whether auxiliary classifiers have to be fitted, in a pass of their own before scoring."""
        return self.auxiliary[0] > 0

    @property
    @final
    def needs_reference(self) -> bool:
        """Whether the weights of the frozen dense model are needed."""
        return any(tap.reference for tap in self.taps)


class WeightCriterion(Criterion, ABC):
    """Scores from weights alone.

    Channels whose weights are all zero are already pruned: they score `dead_score`, below every live channel,
    and neither enter `channel_scores` nor the normalisation. A masked model and its reconstruction then
    agree.

    Attributes:
        dead_score: what they score.
        norm_share: share of a layer's channels that go by L2 norm before anything else, pruned ones included.
            They score above `dead_score` and below the rest, in the order of their norms.
        normalize: how scores of different layers are made comparable.
        by_row: each row's score depends on that row alone.
    """

    dead_score: ClassVar[float] = 0.0
    by_row: ClassVar[bool] = False
    norm_share: float = 0.0
    normalize: functional.Normalizer = "mean"

    @abstractmethod
    def channel_scores(self, rows: Tensor) -> Tensor:
        """(channels, fan) float64 weights, none of the rows all zero, to (channels,) scores."""

    @final
    def scores(self, members: Sequence[Member]) -> list[Tensor]:
        return [self._layer_scores(member) for member in members]

    def _layer_scores(self, member: Member) -> Tensor:
        if self.by_row:
            live, found = (torch.cat(parts) for parts in zip(*map(self._live_and_found, member.blocks()), strict=True))
            scores = torch.full_like(live, self.dead_score, dtype=torch.float64)
        else:
            rows = member.rows()
            live = rows.any(1)
            scores = torch.full_like(live, self.dead_score, dtype=torch.float64)
            if self.norm_share:
                norms = torch.linalg.vector_norm(rows, dim=1)
                small = torch.argsort(norms, stable=True)[: int(self.norm_share * len(rows))]
                small = small[live[small]]
                scores[small] = self.dead_score * (1 - norms[small] / (2 * norms.max()))
                live[small] = False
            found = self.channel_scores(rows if bool(live.all()) else rows[live])
        found = functional.normalize(found, self.normalize)
        if len(found) and found.min() <= self.dead_score:  # as min-max and ranks leave it
            scores = torch.full_like(scores, float(found.min()) - 1)
        scores[live] = found
        return scores

    def _live_and_found(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        live = rows.abs().sum(1) != 0  # faster than any(1)
        return live, self.channel_scores(rows if bool(live.all()) else rows[live])


def complete(members: Sequence[Member], found: Sequence[Tensor | None], missing: Missing, lacking: str) -> list[Tensor]:
    """Scores of all members, those that lack them (None) by the other layers of the group: the channels are the same.

    Where a whole group lacks them, ``missing`` decides; ``lacking`` begins the refusal, "... there is none behind".
    """
    groups: dict[str, list[Tensor]] = {}
    for member, scores in zip(members, found, strict=True):
        if scores is not None:
            groups.setdefault(member.group, []).append(scores)
    without = [member.layer.name for member in members if member.group not in groups]
    if without and (missing == "refuse" or not groups):
        raise ScoreError(f"{lacking} {', '.join(without)}")
    top = 1 + 2 * max((scores.max().item() for of in groups.values() for scores in of), default=0.0)

    for member in members:
        groups.setdefault(member.group, [torch.full((len(member.layer.index),), top, dtype=torch.float64)])
    instead = {group: functional.combine(scores, "mean") for group, scores in groups.items()}
    return [instead[m.group] if scores is None else scores for m, scores in zip(members, found, strict=True)]


def criterion_from(criterion: Criterion | str) -> Criterion:
    """The criterion itself, or the one of that class name in any case (``"bn_scale"``), with its defaults.

    Raises:
        ScoreError: no criterion has that name, or it cannot be built without arguments.

    Example:
        >>> import lightning_prune.criteria
        >>> criterion_from("l1")
        L1(normalize='mean', combine='mean')
    """
    if isinstance(criterion, Criterion):
        return criterion
    leaves = reversed(_leaves(Criterion))  # type: ignore[type-abstract]
    known = {cls.__name__.lower(): cls for cls in leaves}  # the first of a name: one's own takes none of ours
    name = criterion.lower().replace("_", "") if isinstance(criterion, str) else None
    if name not in known:
        names = sorted(_snake(cls.__name__) for cls in known.values())
        hint = did_you_mean(criterion.lower(), names) if isinstance(criterion, str) else ""
        cause = f"criterion must be a Criterion or one of {', '.join(names)}, got {criterion!r}"
        raise ScoreError(f"{cause}.{hint}" if hint else cause)
    return known[name]()


def _snake(name: str) -> str:
    """``BNScale`` as ``bn_scale``, ``TaylorFO`` as ``taylor_fo``; ``APoZ`` and ``ThiNet`` stay one word."""
    return re.sub(r"(?<=[a-z])(?<!Thi)(?=[A-Z][A-Za-z])|(?<=[A-Z]{2})(?=[A-Z][a-z]{2})", "_", name).lower()


def _leaves(cls: type[Criterion]) -> list[type[Criterion]]:
    found = [] if inspect.isabstract(cls) else [cls]
    return found + [leaf for child in cls.__subclasses__() for leaf in _leaves(child)]
