"""Gradient times value, summed over batches: at activations and at weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from lightning_prune.criteria import functional
from lightning_prune.criteria.base import Member, Site, Tap, TapSite
from lightning_prune.criteria.functional import Magnitude

Reduce = Literal["sample", "batch", "dataset", "element"]
Spatial = Literal["sum", "mean"]


@dataclass(frozen=True)
class TaylorTerm(Tap):
    """First-order change of the loss when channel c is zeroed: gradient times value.

    Attributes:
        magnitude: absolute value, square, or with its sign.
        reduction: where the magnitude is taken; see `GRE`.
        site: the tensor.
        spatial: sum or mean over positions; with ``reduction="element"`` always the mean.
    """

    magnitude: Magnitude
    reduction: Reduce
    site: Site
    spatial: Spatial = "sum"
    name = "global"
    gradient = True

    @property
    def degree(self) -> int:  # type: ignore[override]
        """The gradient is squared before it is summed only here."""
        return 2 if self.reduction == "element" and self.magnitude == "square" else 1

    def partial(self, value: Tensor, gradient: Tensor | None) -> Tensor:
        """Sum over positions of gradient times value."""
        assert gradient is not None
        return functional.taylor(value, gradient, self.magnitude if self.reduction == "element" else "signed")

    def reduce(self, partial: Tensor, positions: int) -> tuple[Tensor, int]:
        """Sum over the samples of a batch."""
        samples = len(partial)
        if self.reduction == "element":
            return partial.sum(0) / positions, samples
        if self.spatial == "mean":
            partial = partial / positions
        if self.reduction == "sample":
            return functional.apply_magnitude(partial, self.magnitude).sum(0), samples
        if self.reduction == "batch":
            return functional.apply_magnitude(partial.mean(0), self.magnitude), 1
        return partial.sum(0), samples

    def scores(self, members: Sequence[Member]) -> list[Tensor]:
        """The means, or their magnitude where signs may cancel between samples."""
        means = super().scores(members)
        return [functional.apply_magnitude(x, self.magnitude) for x in means] if self.reduction == "dataset" else means


@dataclass(frozen=True)
class WeightTerm(Tap):
    """Sum over weights of gradient times weight, under the gradient of each batch's mean loss; mean over batches.

    Attributes:
        magnitude: taken of every weight.
        site: the layer's own weight, or those of the layers that read it.
    """

    magnitude: Magnitude
    site: TapSite = "weight"
    name = "weight"
    gradient = True

    def partial(self, value: Tensor, gradient: Tensor | None) -> Tensor:
        """Sum over the weights of a filter."""
        assert gradient is not None
        return functional.taylor(value, gradient, self.magnitude)
