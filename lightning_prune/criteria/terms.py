"""Sums that several criteria take over batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lightning_prune.criteria import functional
from lightning_prune.criteria.base import Site, Tap
from lightning_prune.criteria.functional import Magnitude
from lightning_prune.errors import ScoreError

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
    name: ClassVar[str] = "global"  # type: ignore[misc]
    gradient: ClassVar[bool] = True  # type: ignore[misc]

    @property
    def degree(self) -> int:  # type: ignore[override]
        """The gradient is squared before it is summed only here."""
        return 2 if self.reduction == "element" and self.magnitude == "square" else 1

    def partial(self, value: Tensor, gradient: Tensor | None) -> Tensor:
        """Sum over positions of gradient times value."""
        if gradient is None:
            raise ScoreError("a Taylor term needs a gradient")
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

    def score(self, mean: Tensor) -> Tensor:
        """What a channel is worth, from the mean over samples or batches."""
        return functional.apply_magnitude(mean, self.magnitude) if self.reduction == "dataset" else mean
