"""Schedules: how the removal is spread over training."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

from lightning_prune.errors import PlanError
from lightning_prune.graph import ChannelGraph
from lightning_prune.plan import Plan
from lightning_prune.scoring import Scores
from lightning_prune.selection import GlobalRatio, Selection


@dataclass(frozen=True)
class Rounds:
    """Remove a fixed number of channels, fine-tune, score again, until the ratio is reached.

    The schedule of Li et al., Symmetry 14(7):1372, 2022 (JRE). The last round takes the remainder.

    Args:
        channels: removed per round, counted as the selection's ``over`` says.
        epochs: of fine-tuning between rounds.

    Raises:
        PlanError: less than one channel or epoch.

    Example:
        >>> Rounds(channels=64, epochs=2)
        Rounds(channels=64, epochs=2)
    """

    channels: int = 128
    epochs: int = 20

    def __post_init__(self) -> None:
        if self.channels < 1 or self.epochs < 1:
            raise PlanError(f"channels and epochs must be at least 1, got {self.channels} and {self.epochs}")

    def selections(self, selection: Selection, graph: ChannelGraph) -> list[Selection]:
        """What to select in each round: the same selection at rising ratios.

        Raises:
            PlanError: the selection is not a `GlobalRatio`, which alone ranks over the network.
        """
        if not isinstance(selection, GlobalRatio):
            raise PlanError(f"rounds of {self.channels} channels need GlobalRatio, got {selection!r}")
        total = selection.total(graph)
        count = math.ceil(selection.ratio * total / self.channels)
        steps: list[Selection] = []
        for number in range(1, count + 1):
            step = copy.copy(selection)
            step.ratio = min(number * self.channels / total, selection.ratio)
            steps.append(step)
        return steps or [selection]


def keep_removed(scores: Scores, plan: Plan) -> Scores:
    """Scores in which what an earlier plan removed comes last, so that a later one removes it again."""
    every = [*scores.values(), *(values for members in scores.layers.values() for values in members.values())]
    lowest = min(float(values.min()) for values in every) - 1
    lowered = Scores(
        {name: values.clone() for name, values in scores.items()},
        {name: {k: v.clone() for k, v in members.items()} for name, members in scores.layers.items()},
    )
    for name, group in plan.groups.items():
        lowered[name][list(group.removed)] = lowest
        for layer, kept in group.layers.items():
            gone = sorted(set(range(group.size)) - set(kept))
            lowered.layers[name][layer][gone] = lowest
    return lowered
