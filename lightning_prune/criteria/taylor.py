"""First-order Taylor criteria of Molchanov et al.: feature maps (2016), filters and gates (2019); their terms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

from torch import Tensor

from lightning_prune.criteria import functional
from lightning_prune.criteria.base import Criterion, Member, Site, Tap, TapSite
from lightning_prune.criteria.functional import Combine, Magnitude, Normalizer, normalize_scores
from lightning_prune.errors import ScoreError

Definition = Literal["paper", "jacobgil", "nvlabs"]
Reduce = Literal["sample", "batch", "dataset", "element"]
Spatial = Literal["sum", "mean"]

_REDUCTIONS: dict[Definition, Reduce] = {"paper": "sample", "jacobgil": "dataset", "nvlabs": "element"}


@dataclass(frozen=True)
class TaylorTerm(Tap):
    """First-order change of the loss when channel c is zeroed: gradient times value; ``reduction`` as in `GRE`.

    ``spatial``: sum or mean over positions; with ``reduction="element"`` always the mean.
    """

    magnitude: Magnitude
    reduction: Reduce
    site: Site
    spatial: Spatial = "sum"
    name = "global"
    gradient = True

    @property
    def degree(self) -> int:  # type: ignore[override]
        return 2 if self.reduction == "element" and self.magnitude == "square" else 1

    def partial(self, value: Tensor, gradient: Tensor | None) -> Tensor:
        assert gradient is not None
        return functional.taylor(value, gradient, self.magnitude if self.reduction == "element" else "signed")

    def reduce(self, partial: Tensor, positions: int) -> tuple[Tensor, int]:
        if self.reduction == "element":
            return partial.sum(0) / positions, len(partial)
        if self.spatial == "mean":
            partial = partial / positions
        if self.reduction == "batch":
            return functional.apply_magnitude(partial.mean(0), self.magnitude), 1
        if self.reduction == "sample":
            partial = functional.apply_magnitude(partial, self.magnitude)
        return partial.sum(0), len(partial)

    def scores(self, members: Sequence[Member]) -> list[Tensor]:
        means = super().scores(members)
        return [functional.apply_magnitude(x, self.magnitude) for x in means] if self.reduction == "dataset" else means


@dataclass(frozen=True)
class WeightTerm(Tap):
    """Sum over weights of gradient times weight, under the gradient of each batch's mean loss; mean over batches."""

    magnitude: Magnitude
    site: TapSite = "weight"
    name = "weight"
    gradient = True

    def partial(self, value: Tensor, gradient: Tensor | None) -> Tensor:
        assert gradient is not None
        return functional.taylor(value, gradient, self.magnitude)


@final
@dataclass(frozen=True, kw_only=True)
class Taylor(Criterion):
    """Feature-map Taylor, | (1/M) sum_m dL/dh_m * h_m | per sample, mean over samples, over the layer's l2 norm.

    Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference (2016). M is the
    number of positions of the map. Needs forward and backward. Per-sample gradients as in `GRE`, which is the
    same quantity without the spatial mean and under another normalisation.

    ``site``: the paper prunes the map behind the non-linearity. Behind a ReLU that follows at once gradient
    times value is exactly what it is in front of it (h * 1[h > 0] either way), so the default, the tensor that
    masking zeroes, is the paper's; where an addition comes between, it is the layer's own part.
    Deviation: the paper's optional FLOPs penalty is left to a selection by budget.

    Args:
        definition: ``paper``: absolute value per sample. ``jacobgil`` (a widely copied repository): after the
            mean over all samples, so that signs cancel between them. ``nvlabs`` ("Taylor_output" in the code of
            the 2019 paper): of every position.
        site: as `GRE`.
        normalize: divide by the layer's ``l2`` norm (published), ``mean`` or ``max``, or ``lamp``, or ``none``.
        combine: see `Criterion`.

    Raises:
        ScoreError: unknown setting.

    Example:
        >>> import torch, lightning_prune as lp
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False), torch.nn.Linear(2, 1))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0], [2.0]])), model[1].weight.data.fill_(1.0)
        >>> inputs = torch.ones(1, 1)
        >>> scores = lp.score(model, lp.trace(model, inputs), Taylor(), [inputs], lambda m, x: m(x).mean())
        >>> [round(score, 3) for score in scores["0"].tolist()]  # 1 and 2, over the root of 5
        [0.447, 0.894]
    """

    definition: Definition = "paper"
    site: Site = "bn"
    normalize: Normalizer = "l2"
    combine: Combine = "mean"

    @property
    def taps(self) -> tuple[Tap, ...]:
        return (TaylorTerm("abs", _REDUCTIONS[self.definition], self.site, "mean"),)

    def scores(self, members: Sequence[Member]) -> list[Tensor]:
        return normalize_scores(self.taps[0].scores(members), self.normalize)


@final
@dataclass(frozen=True, kw_only=True)
class TaylorFO(Criterion):
    """Squared first-order change of the loss without a channel: (sum g_h h)^2, or sum over its weights (g_w w)^2.

    Molchanov et al., Importance Estimation for Neural Network Pruning (2019). Needs forward and backward. The
    gradient is that of each batch's mean loss, scores are averaged over batches: they depend on the batch
    size, as published, but for ``reduce="sample"``. Layers are compared by raw scores.

    ``gate`` (the paper's best): the derivative by a factor of 1 behind the batch norm, summed over samples and
    positions. For a batch norm this is their form (g_gamma gamma + g_beta beta)^2, to the last digit.
    ``weight``: method 0 of their code; the bias is left out.
    Deviations: gates on a residual sum add up in their code, over a constant; here `combine` says what a group
    of layers scores. Their momentum of 0.9 between pruning steps belongs to a schedule.

    Args:
        form: ``gate`` or ``weight``.
        reduce: where the square is taken, for gates: of each ``batch``, or of each ``sample`` ("full gradient").
        site: as `GRE`; where gates stand.
        normalize: ``none`` (published), or divide by the layer's ``l2`` norm, ``mean``, ``max``, or ``lamp``.
        combine: see `Criterion`.

    Raises:
        ScoreError: unknown setting, or per-sample squares of weights, for which there is no gradient.

    Example:
        >>> import torch, lightning_prune as lp
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False), torch.nn.Linear(2, 1))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0], [2.0]])), model[1].weight.data.fill_(1.0)
        >>> inputs = torch.ones(4, 1)
        >>> lp.score(model, lp.trace(model, inputs), TaylorFO(), [inputs], lambda m, x: m(x).mean())["0"].tolist()
        [1.0, 4.0]
    """

    form: Literal["gate", "weight"] = "gate"
    reduce: Literal["batch", "sample"] = "batch"
    site: Site = "bn"
    normalize: Normalizer = "none"
    combine: Combine = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form == "weight" and self.reduce == "sample":
            raise ScoreError("reduce='sample' needs form='gate': weights have one gradient per batch")

    @property
    def taps(self) -> tuple[Tap, ...]:
        return (TaylorTerm("square", self.reduce, self.site) if self.form == "gate" else WeightTerm("square"),)

    def scores(self, members: Sequence[Member]) -> list[Tensor]:
        return normalize_scores(self.taps[0].scores(members), self.normalize)
