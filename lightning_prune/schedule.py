"""Schedules: how the removal is spread over training."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_prune.criteria.scores import Scores
from lightning_prune.errors import PlanError, check_choice
from lightning_prune.graph import ChannelGraph
from lightning_prune.plan import GroupPlan, Plan
from lightning_prune.selection import GlobalRatio, Selection

Shape = Literal["cubic", "linear"]
SHARES: dict[Shape, Callable[[float], float]] = {
    "cubic": lambda progress: 1 - (1 - progress) ** 3,
    "linear": lambda progress: progress,
}


@dataclass(frozen=True)
class Step:
    """One removal, and how long is trained before the next.

    Attributes:
        selection: what is gone after it, earlier steps included.
        epochs: whole epochs before the next step.
        batches: batches before the next step, if ``epochs`` is 0.
    """

    selection: Selection
    epochs: int = 0
    batches: int = 0


class Schedule(ABC):
    """When how much is removed. Every step scores anew.

    Attributes:
        soft: every step chooses among all channels again, also among those that an earlier one masked.
        hold: masked channels stay at zero until the next step; if not, they train again. After the last step they
            always stay.
    """

    soft: ClassVar[bool] = False
    hold: bool = True

    @abstractmethod
    def steps(self, selection: Selection, graph: ChannelGraph) -> list[Step]:
        """The steps that lead to ``selection`` on this (dense) graph.

        Raises:
            PlanError: this selection cannot be reached in steps.
        """


@dataclass(frozen=True)
class Rounds(Schedule):
    """Remove a fixed number of channels, fine-tune, score again, until the ratio is reached.

    128 channels and 20 epochs: Li et al., Symmetry 14(7):1372, 2022 (JRE). One channel and 32 batches, every 8th time
    5 whole epochs: Guo et al., 2019 (next-layer Taylor). 100 channels and 30 batches: Molchanov et al., CVPR 2019.
    The last round takes the remainder.

    Args:
        channels: removed per round, counted as the selection's ``over`` says.
        epochs: of fine-tuning between rounds.
        batches: of fine-tuning between rounds, instead of whole epochs.
        intensive_every: after every so many rounds ``intensive_epochs`` are trained instead; None: never.
        intensive_epochs: see there.

    Raises:
        PlanError: less than one of something.

    Example:
        >>> Rounds(channels=1, batches=32, intensive_every=8).intensive_epochs
        5
    """

    channels: int = 128
    epochs: int = 20
    batches: int | None = None
    intensive_every: int | None = None
    intensive_epochs: int = 5

    def __post_init__(self) -> None:
        _check_counts(self, "channels", "epochs", "batches", "intensive_every", "intensive_epochs")

    def steps(self, selection: Selection, graph: ChannelGraph) -> list[Step]:
        """The same selection at rising ratios.

        Raises:
            PlanError: the selection is not a `GlobalRatio`, which alone ranks over the network.
        """
        if not isinstance(selection, GlobalRatio):
            raise PlanError(
                f"rounds of {self.channels} channels need GlobalRatio, got {selection!r}; for other selections there "
                "is Gradual(rounds=...)"
            )
        total = selection.total(graph)
        wanted = selection.ratio * total
        count = max(1, math.ceil(wanted / self.channels - 1e-9))
        pause = (self.epochs, 0) if self.batches is None else (0, self.batches)
        steps = []
        for number in range(1, count + 1):
            part = selection.part(min(1.0, number * self.channels / (wanted or 1)))
            intensive = self.intensive_every is not None and number % self.intensive_every == 0
            steps.append(Step(part, self.intensive_epochs) if intensive else Step(part, *pause))
        return steps


@dataclass(frozen=True)
class Gradual(Schedule):
    r"""A ramp up to the selection: after step i of n the share :math:`1 - (1 - i/n)^3` of its removal is done.

    Zhu and Gupta, "To prune, or not to prune", 2017 (``cubic``: most goes early, while the network recovers easily);
    ``linear``: :math:`i/n`. Serves every selection that counts channels or operations, `Budget` included.

    Args:
        rounds: steps n.
        epochs: of training between steps.
        batches: between steps, instead of whole epochs.
        shape: of the ramp.

    Raises:
        PlanError: less than one of something, or an unknown shape.

    Example:
        >>> from lightning_prune import LayerRatio
        >>> [round(step.selection.ratio, 3) for step in Gradual(rounds=3).steps(LayerRatio(0.5), None)]
        [0.352, 0.481, 0.5]
    """

    rounds: int = 10
    epochs: int = 1
    batches: int | None = None
    shape: Shape = "cubic"

    def __post_init__(self) -> None:
        _check_counts(self, "rounds", "epochs", "batches")
        check_choice("shape", self.shape, Shape, PlanError)

    def steps(self, selection: Selection, graph: ChannelGraph) -> list[Step]:  # noqa: ARG002
        """The same selection asked for rising shares."""
        pause = (self.epochs, 0) if self.batches is None else (0, self.batches)
        shares = [SHARES[self.shape](number / self.rounds) for number in range(1, self.rounds)]
        return [Step(part, *pause) for part in (*map(selection.part, shares), selection)]


@dataclass(frozen=True)
class Soft(Schedule):
    """Choose again every few epochs among all channels; what is masked may come back until the last time.

    He et al., Soft Filter Pruning (IJCAI 2018) and FPGM (CVPR 2019): set filters to zero after an epoch, go on training
    all of them, choose again. Lee et al.'s YOLOv3 runs do the same.

    Args:
        times: how often is chosen.
        epochs: of training between two choices.
        hold: keep masked channels at zero in between (their gradients are masked), so that only their scores decide
            whether they come back; False: they train again at once, as in the papers. Until the last choice only
            filters are zeroed then: with the batch norm's scale and shift at zero a ReLU would let no gradient back.

    Raises:
        PlanError: less than one of something.

    Example:
        >>> Soft(times=100)
        Soft(times=100, epochs=1, hold=False)
    """

    soft: ClassVar[bool] = True
    times: int = 10
    epochs: int = 1
    hold: bool = False

    def __post_init__(self) -> None:
        _check_counts(self, "times", "epochs")

    def steps(self, selection: Selection, graph: ChannelGraph) -> list[Step]:  # noqa: ARG002
        """The same selection every time."""
        return [Step(selection, self.epochs)] * self.times


def keep_removed(scores: Scores, plan: Plan) -> Scores:
    """Scores in which what an earlier plan removed comes last, so that a later one removes it again."""

    def kept(planned: GroupPlan, layer: str | None) -> Iterable[int]:
        return planned.keep if layer is None else planned.layers.get(layer, range(planned.size))

    return _lowered(scores, plan, kept)


def in_dense_channels(scores: Scores, plan: Plan) -> Scores:
    """Scores of a model reconstructed with a plan, in the channels of the dense one; what is gone comes last.

    A group that the smaller model has no longer (only one channel is left of it) keeps what is left.
    """
    lowered = _lowered(scores, plan, lambda planned, _: planned.keep)
    lost = [(name, planned) for name, planned in plan.groups.items() if name not in scores]
    if not lost:
        return lowered
    values = [value for of in (lowered, *lowered.layers.values()) for value in of.values()]
    lowest = min((float(value.min()) for value in values), default=0.0)
    highest = max((float(value.max()) for value in values), default=0.0)
    whole, layers = dict(lowered.items()), dict(lowered.layers)
    for name, planned in lost:
        full = torch.full((planned.size,), lowest, dtype=torch.float64)
        full[list(planned.keep)] = highest + 1
        whole[name], layers[name] = full, dict.fromkeys(planned.layers, full)
    return Scores(whole, layers)


def _lowered(scores: Scores, plan: Plan, kept_by: Callable[[GroupPlan, str | None], Iterable[int]]) -> Scores:
    every = (float(values.min()) for of in (scores, *scores.layers.values()) for values in of.values())
    lowest = min((*every, 0.0)) - 1  # below zero, which no cost divides

    def lowered(group: str, layer: str | None, values: Tensor) -> Tensor:
        if group not in plan.groups:
            return values
        planned = plan.groups[group]
        kept = list(kept_by(planned, layer))
        full = values.new_full((planned.size,), lowest)
        full[kept] = values[kept] if len(values) == planned.size else values
        return full

    return Scores(
        {name: lowered(name, None, values) for name, values in scores.items()},
        {name: {k: lowered(name, k, v) for k, v in of.items()} for name, of in scores.layers.items()},
    )


def _check_counts(schedule: Schedule, *names: str) -> None:
    for name in names:
        value = getattr(schedule, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise PlanError(f"{type(schedule).__name__}: {name} must be an integer of at least 1, got {value!r}")
