"""Next-layer Taylor (Guo et al. 2019): what the layers behind lose with a channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_prune.criteria import functional
from lightning_prune.criteria.base import Criterion, Member, Tap, TapSite, check_choice
from lightning_prune.criteria.functional import Combine, LayerNormalize, Magnitude
from lightning_prune.criteria.taylor import WeightTerm
from lightning_prune.errors import ScoreError

NextForm = Literal["output", "weight"]


@dataclass(frozen=True)
class _OutputTerm(Tap):
    """Sum over all outputs of the next layers of gradient times what the channel adds to them."""

    magnitude: Magnitude
    chunk: int
    name: ClassVar[str] = "next"  # type: ignore[misc]
    site: ClassVar[TapSite] = "reader"  # type: ignore[misc]
    gradient: ClassVar[bool] = True  # type: ignore[misc]

    @property
    def degree(self) -> int:  # type: ignore[override]
        return 2 if self.magnitude == "square" else 1

    def partial(self, value: Tensor, gradient: Tensor | None) -> Tensor:
        if gradient is None:
            raise ScoreError("a Taylor term needs a gradient")
        return functional.taylor(value, gradient, self.magnitude)

    def reduce(self, partial: Tensor, positions: int) -> tuple[Tensor, int]:  # noqa: ARG002
        return partial.sum(0), len(partial)


@dataclass(frozen=True)
class _Positions(Tap):
    """Positions of the layer's own output."""

    name: ClassVar[str] = "positions"  # type: ignore[misc]
    site: ClassVar[TapSite] = "conv"  # type: ignore[misc]

    def partial(self, value: Tensor, gradient: Tensor | None) -> Tensor:  # noqa: ARG002
        return torch.zeros(value.shape[:2], dtype=torch.float64, device=value.device)

    def reduce(self, partial: Tensor, positions: int) -> tuple[Tensor, int]:
        return torch.full_like(partial[0], positions * len(partial)), len(partial)


@final
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
        >>> from lightning_prune.graph import trace
        >>> from lightning_prune.criteria.scoring import score
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False), torch.nn.Linear(2, 1))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0], [2.0]]))
        >>> _ = model[1].weight.data.copy_(torch.tensor([[3.0, -4.0]]))
        >>> inputs = torch.ones(4, 1)
        >>> criterion = NextLayerTaylor(normalize="none")
        >>> score(model, trace(model, inputs), criterion, [inputs], lambda model, x: model(x).mean())["0"].tolist()
        [3.0, 8.0]
    """

    def __init__(
        self,
        *,
        form: NextForm = "output",
        magnitude: Magnitude = "abs",
        chunk: int = 8,
        normalize: LayerNormalize = "l2",
        combine: Combine = "mean",
    ) -> None:
        check_choice("form", form, NextForm)
        check_choice("magnitude", magnitude, Magnitude)
        check_choice("normalize", normalize, LayerNormalize)
        check_choice("combine", combine, Combine)
        if not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1:
            raise ScoreError(f"chunk must be an integer >= 1, got {chunk!r}")
        self.form = form
        self.magnitude = magnitude
        self.chunk = chunk
        self.normalize = normalize
        self.combine = combine

    @property
    @override
    def taps(self) -> tuple[Tap, ...]:
        if self.form == "weight":
            return (WeightTerm(self.magnitude, "reader_weight"),)
        return (_OutputTerm(self.magnitude, self.chunk), _Positions())

    @override
    def scores(self, members: Sequence[Member]) -> list[Tensor]:
        return [functional.normalize(self._raw(member), self.normalize) for member in members]

    def _raw(self, member: Member) -> Tensor:
        if self.form == "weight":
            return member.means["weight"]
        return member.means["next"] / member.means["positions"]
