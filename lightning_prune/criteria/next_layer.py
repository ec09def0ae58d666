"""Next-layer Taylor (Guo et al. 2019): what the layers behind lose with a channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from lightning_prune.criteria import functional
from lightning_prune.criteria.base import Criterion, Member, Tap
from lightning_prune.criteria.functional import Combine, Magnitude, Normalizer
from lightning_prune.criteria.number_checks import check_integer
from lightning_prune.criteria.taylor import WeightTerm


@dataclass(frozen=True)
class _OutputTerm(Tap):
    """Sum over all outputs of the next layers of gradient times what the channel adds to them."""

    magnitude: Magnitude
    chunk: int
    name = "next"
    site = "reader"
    gradient = True

    @property
    def degree(self) -> int:  # type: ignore[override]
        return 2 if self.magnitude == "square" else 1

    def partial(self, value: Tensor, gradient: Tensor | None) -> Tensor:
        assert gradient is not None
        return functional.taylor(value, gradient, self.magnitude)


@dataclass(frozen=True)
class _Positions(Tap):
    """Positions of the layer's own output."""

    name = "positions"
    site = "conv"

    def partial(self, value: Tensor, gradient: Tensor | None) -> Tensor:  # noqa: ARG002
        return torch.zeros(value.shape[:2], dtype=torch.float64, device=value.device)

    def reduce(self, partial: Tensor, positions: int) -> tuple[Tensor, int]:
        return torch.full_like(partial[0], positions * len(partial)), len(partial)


@final
@dataclass(frozen=True, kw_only=True)
class NextLayerTaylor(Criterion):
    """Taylor expansion at the next layer: (1 / NHW) sum over its outputs of |dz_c| * |dL/dz|, by the layer's l2 norm.

    Guo et al., Pruning Based on the Taylor Expansion of the Next Layer (ICIG 2019), as their code computes it:
    dz_c = W_next[:, c] * a_c is what the next layer's output z loses with channel c; H, W are the channel's own
    map. Needs forward and backward. The absolute value of every element is the point: with signs the ``output``
    form, the ``weight`` form and feature-map Taylor (`Taylor`) at the next layer's input are one number.

    ``output``: by one single-channel convolution per channel, ``chunk`` channels at a time; no second forward
    (the authors run one per channel). Per-sample gradients as in `GRE`; memory: ``chunk`` times the output of the
    largest next layer. ``weight`` (the paper's words): sum over W_next[:, c] of |g_w w|, with the gradient of each
    batch's mean loss; it is not divided by NHW.
    Every convolution and linear layer that reads the channels counts, and all are summed (branches,
    concatenations, residual sums: the readers of the sum), so that layers of one group score alike. Depthwise
    convolutions belong to the channel; other parameters that read it (attention, embeddings) do not count.
    Deviation: only zeroing at the input of the next layer, what masking does, not the convolution's output.

    Args:
        form: ``output`` or ``weight``.
        magnitude: ``abs`` (published), ``square`` or ``signed`` (only for study), of every element.
        chunk: channels held at once in the ``output`` form.
        normalize: divide by the layer's ``l2`` norm (published), ``mean`` or ``max``, or ``lamp``, or ``none``.
        combine: see `Criterion`.

    Raises:
        ScoreError: unknown setting; while scoring, a next layer whose output cannot be computed from its weight.

    Example:
        >>> import lightning_prune as lp
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False), torch.nn.Linear(2, 1))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0], [2.0]]))
        >>> _ = model[1].weight.data.copy_(torch.tensor([[3.0, -4.0]]))
        >>> inputs = torch.ones(4, 1)
        >>> criterion = NextLayerTaylor(normalize="none")
        >>> lp.score(model, lp.trace(model, inputs), criterion, [inputs], lambda m, x: m(x).mean())["0"].tolist()
        [3.0, 8.0]
    """

    form: Literal["output", "weight"] = "output"
    magnitude: Magnitude = "abs"
    chunk: int = 8
    normalize: Normalizer = "l2"
    combine: Combine = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("chunk", self.chunk, "an integer >= 1", 1)

    @property
    def taps(self) -> tuple[Tap, ...]:
        if self.form == "weight":
            return (WeightTerm(self.magnitude, "reader_weight"),)
        return (_OutputTerm(self.magnitude, self.chunk), _Positions())

    def scores(self, members: Sequence[Member]) -> list[Tensor]:
        term, *positions = self.taps
        raw = term.scores(members)
        if positions:
            raw = [total / count for total, count in zip(raw, positions[0].scores(members), strict=True)]
        return functional.normalize_scores(raw, self.normalize)
