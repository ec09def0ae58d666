"""Batch-norm scales as importance, and the penalty that makes them sparse while training (Network Slimming)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_prune.criteria import functional
from lightning_prune.criteria.base import Criterion, Member, Missing, complete
from lightning_prune.criteria.functional import Combine, Normalizer
from lightning_prune.criteria.number_checks import check_weight
from lightning_prune.graph.groups import Group, Layer


@final
@dataclass(frozen=True, kw_only=True)
class BNScale(Criterion):
    """Absolute batch-norm scale of a channel, |gamma_c|.

    Liu et al., Learning Efficient Convolutional Networks through Network Slimming (2017). Needs no data, but
    says little unless the model was trained with the L1 penalty on the scales: `BNSparsityCallback` in a Trainer,
    `add_bn_sparsity_` in a loop of your own. Scores are compared over the network as they are.

    A channel of k filters scores the mean over them. A layer without a batch norm of its own is scored by those
    that normalise its channels later (DenseNet, pre-activation), else by the other layers of its group.

    Args:
        normalize: ``none`` (published), or divide by the layer's ``mean``, ``max``, ``l2`` norm, or ``lamp``.
        missing: for groups without any batch norm: ``refuse``, or ``keep``: they score above all others.
        combine: see `Criterion`.

    Raises:
        ScoreError: unknown setting; while scoring, no batch norm with a scale to score a layer by.

    Example:
        >>> import lightning_prune as lp
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 1, 1)).eval()
        >>> _ = model[1].weight.data.copy_(torch.tensor([0.5, -2.0]))
        >>> lp.score(model, lp.trace(model, torch.randn(1, 1, 4, 4)), BNScale())["0"].tolist()
        [0.5, 2.0]
    """

    normalize: Normalizer = "none"
    missing: Missing = "refuse"
    combine: Combine = "mean"

    def scores(self, members: Sequence[Member]) -> list[Tensor]:
        found = [self._layer_scores(member) if member.scales else None for member in members]
        lacking = (
            "BNScale needs batch norms with a scale; use another criterion, such as L1, or missing='keep' to leave "
            "such layers as they are: there is none behind"
        )
        return complete(members, found, self.missing, lacking)

    def _layer_scores(self, member: Member) -> Tensor:
        scales = torch.stack([scale.abs().mean(1) for scale in member.scales]).mean(0)
        return functional.normalize(scales, self.normalize)


def batch_norm_scales(model: nn.Module, group: Group, layer: Layer) -> tuple[Tensor, ...]:
    """Gamma of the layer's own batch norm, else of those that normalise its channels, else the group's channels.

    (channels, k) float64 each, for the k filters of a channel; empty if there is none.
    """
    if layer.norm is not None:
        weight = getattr(model.get_submodule(layer.norm), "weight", None)
        found = [] if weight is None else [(weight, layer.index)]
    else:
        norms = [part for part in group.slices if part.norm and part.tensor.endswith(".weight")]
        own = [part for part in norms if part.layer == layer.name] or [part for part in norms if part.layer is None]
        found = [(model.get_parameter(part.tensor), part.index) for part in own]
    return tuple(weight.detach().to(torch.float64)[index.to(weight.device)] for weight, index in found)


def add_bn_sparsity_(model: nn.Module, strength: float = 1e-4, parameters: Collection[Tensor] | None = None) -> None:
    """Add the subgradient of ``strength * sum |gamma|`` to the gradients of all batch-norm scales, in place.

    Call it between ``backward()`` and ``optimizer.step()``, once per step. Liu et al. 2017: 1e-4 for VGG, 1e-5
    for ResNet-164 and DenseNet-40, with all scales starting from 0.5. The subgradient at 0 is 0, so masked
    channels stay where they are; scales without a gradient are left alone.

    Args:
        model: with batch norms.
        strength: weight of the penalty.
        parameters: only scales among these, for example those of one optimizer; None: all.

    Raises:
        ScoreError: the strength is negative or not finite.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> _ = norm.weight.data.copy_(torch.tensor([2.0, -0.5]))
        >>> norm(torch.zeros(3, 2)).sum().backward()
        >>> add_bn_sparsity_(norm, 0.1)
        >>> norm.weight.grad.tolist()  # doctest: +ELLIPSIS
        [0.1..., -0.1...]
    """
    check_weight("strength", strength)
    wanted = None if parameters is None else {id(parameter) for parameter in parameters}
    scales = {id(m.weight): m.weight for m in model.modules() if isinstance(m, _BatchNorm) and m.weight is not None}
    for key, scale in scales.items():
        if scale.grad is not None and (wanted is None or key in wanted):
            scale.grad.add_(scale.detach().sign(), alpha=strength)
