"""Local, global and joint reconstruction error (Li, Xiong and Xu, Symmetry 14(7):1372, 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

from torch import Tensor
from typing_extensions import override

from lightning_prune.criteria import functional
from lightning_prune.criteria.base import (
    Criterion,
    Member,
    Site,
    Tap,
    check_choice,
    check_weight,
    normalize_scores,
)
from lightning_prune.criteria.functional import Combine, Magnitude, Normalizer, Scope
from lightning_prune.criteria.terms import Reduce, Spatial, TaylorTerm
from lightning_prune.errors import ScoreError

Reference = Literal["self", "baseline"]


@dataclass(frozen=True)
class _LocalTerm(Tap):
    """L_p(c), squared Frobenius norm of the map that filter c produces."""

    spatial: Spatial
    reference: bool
    name: ClassVar[str] = "local"  # type: ignore[misc]
    site: ClassVar[Site] = "conv"  # type: ignore[misc]

    def partial(self, value: Tensor, gradient: Tensor | None) -> Tensor:  # noqa: ARG002
        return functional.energy(value)

    def reduce(self, partial: Tensor, positions: int) -> tuple[Tensor, int]:
        total = partial.sum(0)
        return (total / positions if self.spatial == "mean" else total), len(partial)


@final
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

    def __init__(
        self,
        *,
        magnitude: Magnitude = "abs",
        reduce: Reduce = "sample",
        site: Site = "bn",
        scope: Scope = "layer",
        normalize: Normalizer = "minmax",
        combine: Combine = "mean",
    ) -> None:
        check_choice("magnitude", magnitude, Magnitude)
        check_choice("reduce", reduce, Reduce)
        check_choice("site", site, Site)
        _check_normalization(scope, normalize, combine)
        self.magnitude = magnitude
        self.reduce = reduce
        self.site = site
        self.scope = scope
        self.normalize = normalize
        self.combine = combine

    @property
    @override
    def taps(self) -> tuple[Tap, ...]:
        return (self._term,)

    @property
    def _term(self) -> TaylorTerm:
        return TaylorTerm(self.magnitude, self.reduce, self.site)

    @override
    def scores(self, members: Sequence[Member]) -> list[Tensor]:
        raw = [self._term.score(member.means["global"]) for member in members]
        return normalize_scores(raw, self.normalize, self.scope)


@final
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

    def __init__(
        self,
        *,
        spatial: Spatial = "sum",
        reference: Reference = "self",
        scope: Scope = "layer",
        normalize: Normalizer = "minmax",
        combine: Combine = "mean",
    ) -> None:
        check_choice("spatial", spatial, Spatial)
        check_choice("reference", reference, Reference)
        _check_normalization(scope, normalize, combine)
        self.spatial = spatial
        self.reference = reference
        self.scope = scope
        self.normalize = normalize
        self.combine = combine

    @property
    @override
    def taps(self) -> tuple[Tap, ...]:
        return (_LocalTerm(self.spatial, self.reference == "baseline"),)

    @override
    def scores(self, members: Sequence[Member]) -> list[Tensor]:
        return normalize_scores([member.means["local"] for member in members], self.normalize, self.scope)


@final
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

    def __init__(
        self,
        *,
        magnitude: Magnitude = "abs",
        reduce: Reduce = "sample",
        site: Site = "bn",
        spatial: Spatial = "sum",
        reference: Reference = "self",
        scope: Scope = "layer",
        normalize: Normalizer = "minmax",
        alpha: float = 1.0,
        beta: float = 1.0,
        combine: Combine = "mean",
    ) -> None:
        check_choice("magnitude", magnitude, Magnitude)
        check_choice("reduce", reduce, Reduce)
        check_choice("site", site, Site)
        check_choice("spatial", spatial, Spatial)
        check_choice("reference", reference, Reference)
        _check_normalization(scope, normalize, combine)
        check_weight("alpha", alpha)
        check_weight("beta", beta)
        if alpha == beta == 0:
            raise ScoreError("alpha and beta must not both be 0: every channel would score the same")
        self.magnitude = magnitude
        self.reduce = reduce
        self.site = site
        self.spatial = spatial
        self.reference = reference
        self.scope = scope
        self.normalize = normalize
        self.alpha = alpha
        self.beta = beta
        self.combine = combine

    @property
    @override
    def taps(self) -> tuple[Tap, ...]:
        local = _LocalTerm(self.spatial, self.reference == "baseline")
        return ((self._term,) if self.alpha else ()) + ((local,) if self.beta else ())

    @property
    def _term(self) -> TaylorTerm:
        return TaylorTerm(self.magnitude, self.reduce, self.site)

    @override
    def scores(self, members: Sequence[Member]) -> list[Tensor]:
        parts = []
        if self.alpha:
            raw = [self._term.score(member.means["global"]) for member in members]
            parts.append([self.alpha * x for x in normalize_scores(raw, self.normalize, self.scope)])
        if self.beta:
            raw = [member.means["local"] for member in members]
            parts.append([self.beta * x for x in normalize_scores(raw, self.normalize, self.scope)])
        return [first + second for first, second in zip(*parts, strict=True)] if len(parts) == 2 else parts[0]


def _check_normalization(scope: str, normalize: str, combine: str) -> None:
    check_choice("scope", scope, Scope)
    check_choice("normalize", normalize, Normalizer)
    check_choice("combine", combine, Combine)
