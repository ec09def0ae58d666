"""Average percentage of zeros (Hu et al. 2016)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_prune.criteria.base import Criterion, Member, Missing, Tap, complete
from lightning_prune.criteria.functional import Combine
from lightning_prune.criteria.number_checks import check_weight


@dataclass(frozen=True)
class _Zeros(Tap):
    """Share of a rectified map that is zero."""

    eps: float
    name = "zeros"
    site = "rectifier"
    optional = True

    def partial(self, value: Tensor, gradient: Tensor | None) -> Tensor:  # noqa: ARG002
        return (value <= self.eps).sum(-1).to(torch.float64)

    def reduce(self, partial: Tensor, positions: int) -> tuple[Tensor, int]:
        return partial.sum(0) / positions, len(partial)


@final
@dataclass(frozen=True, kw_only=True)
class APoZ(Criterion):
    """Share of a channel's rectified activations that is not zero, 1 - #{a_c(n, m) <= eps} / (N M).

    Hu et al., Network Trimming (2016): a is the map behind the rectifier, M its positions; a channel that is
    mostly zero is redundant. Needs forward only. Shares are compared over the network as they are.

    The rectifier (relu, leaky, parametric and randomised relu, relu6, clamp at 0, threshold; module or function)
    is found by following the layer's output through batch norms, additions, products with other maps,
    concatenations, pooling and dropout while the model runs. Layers that meet in an addition share one map. A
    layer without one is scored by the other layers of its group. Deviation: the paper's rule to prune what lies
    one standard deviation above a layer's mean belongs to a selection.

    Args:
        eps: activations up to this count as zero. With the default 0 negative ones do (leaky rectifiers never
            give zeros).
        missing: for groups without a rectifier: ``refuse``, or ``keep``: they score above all others.
        combine: see `Criterion`.

    Raises:
        ScoreError: unknown setting; while scoring, no rectifier behind a layer.

    Example:
        >>> import lightning_prune as lp
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
        >>> inputs = torch.tensor([[1.0], [2.0], [3.0], [-1.0]])
        >>> lp.score(model, lp.trace(model, inputs), APoZ(), [inputs])["0"].tolist()
        [0.75, 0.25]
    """

    eps: float = 0.0
    missing: Missing = "refuse"
    combine: Combine = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight("eps", self.eps)

    @property
    def taps(self) -> tuple[Tap, ...]:
        return (_Zeros(self.eps),)

    def scores(self, members: Sequence[Member]) -> list[Tensor]:
        found = [
            1 - member.means["zeros"] / member.layer.index.shape[1] if "zeros" in member.means else None
            for member in members
        ]
        lacking = (
            "APoZ counts the zeros of rectifiers such as ReLU; use another criterion, or missing='keep' to leave such "
            "layers as they are: on these batches none ran behind"
        )
        return complete(members, found, self.missing, lacking)
