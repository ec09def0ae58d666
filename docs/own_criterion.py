"""A criterion of one's own: how much the activations of a channel vary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_prune.criteria import Criterion, Member, Tap
from lightning_prune.criteria.functional import Normalizer, normalize_scores


@dataclass(frozen=True)
class Moment(Tap):
    """Mean of a ** power over samples and positions, of what enters the first layer that reads the channels."""

    power: int
    site = "activation"

    @property
    def name(self) -> str:
        """Key of the mean."""
        return f"moment{self.power}"

    def partial(self, value: Tensor, gradient: Tensor | None) -> Tensor:
        """Sum over positions: (N, F, M) to (N, F)."""
        return value.double().pow(self.power).sum(-1)

    def reduce(self, partial: Tensor, positions: int) -> tuple[Tensor, int]:
        """Sum over a batch, and what to divide it by."""
        return partial.sum(0), positions * len(partial)


@dataclass(frozen=True, kw_only=True)
class ActivationVariance(Criterion):
    """s_c = E[a_c^2] - E[a_c]^2 over samples and positions, by the layer's mean: what hardly varies says little.

    Polyak and Wolf, Channel-Level Acceleration of Deep Face Representations (IEEE Access 2015). Forward only.
    """

    normalize: Normalizer = "mean"

    @property
    def taps(self) -> tuple[Tap, ...]:
        """What is summed over batches."""
        return Moment(1), Moment(2)

    def scores(self, members: Sequence[Member]) -> list[Tensor]:
        """From the means of all layers to one score per channel of each."""
        return normalize_scores([self._variance(member) for member in members], self.normalize)

    def _variance(self, member: Member) -> Tensor:
        maps = member.layer.reader_index.shape[1]  # more than one behind a flatten or before a grouped convolution
        return member.means["moment2"] / maps - (member.means["moment1"] / maps).square()
