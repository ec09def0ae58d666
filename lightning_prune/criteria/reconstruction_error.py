"""Local, global and joint reconstruction error (Li, Xiong and Xu, Symmetry 14(7):1372, 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor

from lightning_prune.criteria.base import Criterion, Member, Site, Tap
from lightning_prune.criteria.functional import Combine, Magnitude, Normalizer, Scope, normalize_scores
from lightning_prune.criteria.number_checks import check_weight
from lightning_prune.criteria.taylor import Reduce, Spatial, TaylorTerm
from lightning_prune.errors import ScoreError

Reference = Literal["self", "baseline"]


@dataclass(frozen=True)
class _EnergyTerm(Tap):
    """L_p(c), squared Frobenius norm of the map that filter c produces."""

    spatial: Spatial
    reference: bool
    name = "local"
    site = "conv"

    def partial(self, value: Tensor, gradient: Tensor | None) -> Tensor:  # noqa: ARG002
        return value.square().sum(-1).to(torch.float64)

    def reduce(self, partial: Tensor, positions: int) -> tuple[Tensor, int]:
        total = partial.sum(0)
        return (total / positions if self.spatial == "mean" else total), len(partial)


@final
@dataclass(frozen=True, kw_only=True)
class GRE(Criterion):
    """Global reconstruction error: first-order Taylor estimate of the loss change, |sum_hw dL/dh_c * h_c|.

    Li, Xiong and Xu 2022, eq. 9; the same quantity as the feature-map Taylor of Molchanov et al. 2016 up to
    the spatial mean. Needs forward and backward. The gradient is rescaled by the batch size, so that a loss
    which averages over samples gives the gradient of each sample's own loss and scores do not depend on the
    split into batches.

    Args:
        magnitude: ``abs`` (eq. 5), ``square`` (eq. 8) or ``signed`` (literal eq. 9, only for study).
        reduce: where the magnitude is taken. ``sample``: after the sum over positions, then the mean over
            samples. ``batch``: after the mean over each batch (depends on the split). ``dataset``: after the
            mean over all samples (signs cancel between samples, as in the widely copied code of jacobgil).
            ``element``: before the mean over positions (as NVlabs).
        site: tensor h. ``bn``: after batch norm, what masking zeroes; ``conv``: before it; ``activation``:
            what enters the first reading layer, with the gradient from everything that reads it.
        scope: normalise within each ``layer`` or over the ``network``.
        normalize: ``minmax`` (eq. 10) or another one of `functional.normalize`.
        combine: see `Criterion`.

    Raises:
        ScoreError: unknown setting.

    Example:
        >>> GRE(site="conv").needs_backward
        True
    """

    magnitude: Magnitude = "abs"
    reduce: Reduce = "sample"
    site: Site = "bn"
    scope: Scope = "layer"
    normalize: Normalizer = "minmax"
    combine: Combine = "mean"

    @property
    def taps(self) -> tuple[Tap, ...]:
        return (TaylorTerm(self.magnitude, self.reduce, self.site),)

    def scores(self, members: Sequence[Member]) -> list[Tensor]:
        return normalize_scores(self.taps[0].scores(members), self.normalize, self.scope)


@final
@dataclass(frozen=True, kw_only=True)
class LRE(Criterion):
    """Local reconstruction error: energy of the map that the channel's filters produce, ||z_c||_F^2.

    Li, Xiong and Xu 2022, eq. 4: what the layer's output loses when the channel goes. z is the convolution
    output, before batch norm. Needs forward only. Mean over samples.

    Args:
        spatial: ``sum`` over positions (Frobenius norm) or ``mean``, the sane choice with
            ``scope="network"``, where sums make large early maps count more.
        reference: ``self``: z of the current model. ``baseline``: z of the frozen dense model; equal in round
            one.
        scope: normalise within each ``layer`` or over the ``network``.
        normalize: ``minmax`` (eq. 11) or another one of `functional.normalize`.
        combine: see `Criterion`.

    Raises:
        ScoreError: unknown setting.

    Example:
        >>> LRE().needs_forward, LRE().needs_backward, LRE(reference="baseline").needs_reference
        (True, False, True)
    """

    spatial: Spatial = "sum"
    reference: Reference = "self"
    scope: Scope = "layer"
    normalize: Normalizer = "minmax"
    combine: Combine = "mean"

    @property
    def taps(self) -> tuple[Tap, ...]:
        return (_EnergyTerm(self.spatial, self.reference == "baseline"),)

    def scores(self, members: Sequence[Member]) -> list[Tensor]:
        return normalize_scores(self.taps[0].scores(members), self.normalize, self.scope)


@final
@dataclass(frozen=True, kw_only=True)
class JRE(Criterion):
    """Joint reconstruction error: alpha * normalised `GRE` + beta * normalised `LRE`.

    Li, Xiong and Xu 2022, eqs. 10-12. Needs forward and backward. ``alpha=1, beta=0`` ranks as GRE,
    ``alpha=0, beta=1`` as LRE; a term of weight 0 is not computed. The paper leaves open most of what the
    switches below decide; published as far as it speaks: ``minmax``, weights 1:1, absolute value (eq. 5),
    summed energy. ``scope="network"`` is the literal reading of eqs. 10-11, but there summed energy protects
    all early layers (use ``spatial="mean"``).

    Args:
        magnitude: as `GRE`.
        reduce: as `GRE`.
        site: as `GRE`; concerns the global term, the local one is always the convolution output.
        spatial: as `LRE`.
        reference: as `LRE`.
        scope: extremes of each ``layer`` or of the ``network``.
        normalize: ``minmax`` or another one of `functional.normalize`.
        alpha: weight of the global term.
        beta: weight of the local term.
        combine: see `Criterion`.

    Raises:
        ScoreError: unknown setting, negative weight, or both weights 0.

    Example:
        >>> JRE(beta=0.5)  # doctest: +ELLIPSIS
        JRE(magnitude='abs', reduce='sample', site='bn', ... alpha=1.0, beta=0.5, combine='mean')
    """

    magnitude: Magnitude = "abs"
    reduce: Reduce = "sample"
    site: Site = "bn"
    spatial: Spatial = "sum"
    reference: Reference = "self"
    scope: Scope = "layer"
    normalize: Normalizer = "minmax"
    alpha: float = 1.0
    beta: float = 1.0
    combine: Combine = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight("alpha", self.alpha)
        check_weight("beta", self.beta)
        if self.alpha == self.beta == 0:
            raise ScoreError("alpha and beta must not both be 0: every channel would score the same")

    @property
    def taps(self) -> tuple[Tap, ...]:
        return tuple(tap for _, term in self._terms for tap in term.taps)

    @property
    def _terms(self) -> tuple[tuple[float, GRE | LRE], ...]:
        scale: dict[str, Any] = {"scope": self.scope, "normalize": self.normalize}
        gre = GRE(magnitude=self.magnitude, reduce=self.reduce, site=self.site, **scale)
        lre = LRE(spatial=self.spatial, reference=self.reference, **scale)
        both = ((self.alpha, gre), (self.beta, lre))
        return tuple((weight, term) for weight, term in both if weight)

    def scores(self, members: Sequence[Member]) -> list[Tensor]:
        parts = [[weight * scores for scores in term.scores(members)] for weight, term in self._terms]
        return [torch.stack(of).sum(0) for of in zip(*parts, strict=True)]
