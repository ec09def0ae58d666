"""Discrimination-aware channel pruning (Zhuang et al. 2018), in a reduced form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_prune.criteria import functional
from lightning_prune.criteria.base import Criterion, Member, Tap
from lightning_prune.criteria.functional import Combine, Normalizer
from lightning_prune.criteria.number_checks import check_integer, check_weight


@dataclass(frozen=True)
class _GradientTerm(Tap):
    """Gradient of the loss by the weights that read each channel, mean over batches."""

    name = "slope"
    site = "reader_weight"
    gradient = True
    joint = True

    def partial(self, value: Tensor, gradient: Tensor | None) -> Tensor:  # noqa: ARG002
        assert gradient is not None
        return gradient[0].to(torch.float64)

    def reduce(self, partial: Tensor, positions: int) -> tuple[Tensor, int]:  # noqa: ARG002
        return partial, 1


@final
@dataclass(frozen=True, kw_only=True)
class DCP(Criterion):
    r"""Norm of the loss gradient by the weights that read a channel, with auxiliary losses: ||dL/dW_next[:, c]||_F.

    Zhuang et al., Discrimination-Aware Channel Pruning (NeurIPS 2018), **reduced** to one ranking. Here
    :math:`L = L_f + \lambda \sum_p L_S^p`: the loss of the training step, and the cross-entropy of ``heads``
    classifiers, evenly spread over the layers, each on relu(z) averaged over positions. The gradient is the mean over
    batches, taken before the norm: equally large batches may be split in any way. Needs forward and backward, labels
    (those that the training step gives to `torch.nn.functional.cross_entropy`) and, with heads, two passes over the
    data: the first fits them.

    What is left out: channels are not added one by one from none, with a new gradient and weight updates after each;
    the gradient is taken once, at the current weights. There the reconstruction loss L_M has no gradient, so it is left
    out too. No layer is tuned with the auxiliary losses before. Heads use the layer's own batch norm and are fitted in
    closed form (Fisher's linear discriminant, shrunk by a tenth), not by gradient descent. Every layer hears all
    losses, not only that of the next head. The norm is the paper's, over all of W_next[:, c]; the code sums the norms
    of single kernels. Several next layers count as one (branches, concatenations, residual sums: the readers of the
    sum). Memory: the gradient of all these weights, in float64.

    Args:
        heads: auxiliary classifiers (published: 2 for VGG and ResNet-18, 3 for ResNet-50); 0: none, one pass.
        weight: :math:`\lambda` of each (published: 1).
        normalize: divide by the layer's ``mean`` (the paper prunes each layer alike), ``max``, or ``l2`` norm, or
            another one of `functional.normalize`.
        combine: see `Criterion`.

    Raises:
        ScoreError: unknown setting; while scoring, no next layer, or with heads no labels.

    Example:
        >>> import lightning_prune as lp
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False), torch.nn.Linear(2, 1))
        >>> _ = model[0].weight.data.copy_(torch.tensor([[3.0], [4.0]]))
        >>> inputs, criterion = torch.ones(4, 1), DCP(heads=0, normalize="none")
        >>> lp.score(model, lp.trace(model, inputs), criterion, [inputs], lambda m, x: m(x).mean())["0"].tolist()
        [3.0, 4.0]
    """

    heads: int = 2
    weight: float = 1.0
    normalize: Normalizer = "mean"
    combine: Combine = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("heads", self.heads, "an integer >= 0", 0)
        check_weight("weight", self.weight)

    @property
    def taps(self) -> tuple[Tap, ...]:
        return (_GradientTerm(),)

    @property
    def auxiliary(self) -> tuple[int, float]:
        return self.heads, self.weight

    def scores(self, members: Sequence[Member]) -> list[Tensor]:
        norms = [torch.linalg.vector_norm(member.means["slope"], dim=1) for member in members]
        return [functional.normalize(norm, self.normalize) for norm in norms]
