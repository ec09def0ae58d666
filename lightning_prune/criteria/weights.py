"""Criteria that look at weights alone: norms and the geometric median."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from lightning_prune.criteria import functional
from lightning_prune.criteria.base import WeightCriterion
from lightning_prune.criteria.functional import Combine, Distance, Normalizer
from lightning_prune.criteria.number_checks import check_weight
from lightning_prune.errors import ScoreError


@final
@dataclass(frozen=True, kw_only=True)
class L1(WeightCriterion):
    """Sum of absolute weights of a channel's filters, ||F_c||_1.

    Li et al., Pruning Filters for Efficient ConvNets (2017). Needs weights only; the bias is ignored. The
    paper compares within a layer; ``normalize`` makes layers comparable for global selection (raw norms grow
    with the fan-in) and changes no order inside a layer.

    Args:
        normalize: over the layer's live channels: ``mean``, ``max``, ``l2``, ``none`` or another one of
            `functional.normalize`.
        combine: see `Criterion`.

    Raises:
        ScoreError: unknown setting.

    Example:
        >>> L1().channel_scores(torch.tensor([[1.0, -2.0], [0.5, 0.0]])).tolist()
        [3.0, 0.5]
    """

    by_row: ClassVar[bool] = True

    normalize: Normalizer = "mean"
    combine: Combine = "mean"

    def channel_scores(self, rows: Tensor) -> Tensor:
        return rows.abs().sum(1)


@final
@dataclass(frozen=True, kw_only=True)
class L2(WeightCriterion):
    """Euclidean norm of the weights of a channel's filters, ||F_c||_2.

    He et al., Soft Filter Pruning (2018). Needs weights only; the bias is ignored.

    Args:
        normalize: as `L1`.
        combine: see `Criterion`.

    Raises:
        ScoreError: unknown setting.

    Example:
        >>> L2().channel_scores(torch.tensor([[3.0, -4.0], [0.5, 0.0]])).tolist()
        [5.0, 0.5]
    """

    by_row: ClassVar[bool] = True

    normalize: Normalizer = "mean"
    combine: Combine = "mean"

    def channel_scores(self, rows: Tensor) -> Tensor:
        return torch.linalg.vector_norm(rows, dim=1)


@final
@dataclass(frozen=True, kw_only=True)
class FPGM(WeightCriterion):
    """Summed distance of a channel's filters to those of all other channels, sum_j d(F_c, F_j).

    He et al., Filter Pruning via Geometric Median (2019), eq. 4: the channel nearest to the others is the
    most replaceable. Needs weights only. Cost: channels^2 times fan-in per layer.

    Channels that are already zero do not count as neighbours and score -1, below any live one (the paper
    prunes them again and again because their distance sum is small; this keeps that without letting them
    attract others). ``norm_share`` is the paper's "mix": that share of each layer goes by its L2 norm, and the
    distance decides among the survivors only; "mix 40 %" is ``norm_share=0.1`` under ``LayerRatio(0.4)``.
    Deviations: the paper's released code ignores its distance option and always uses l2; the paper ranks per
    layer, here ``normalize`` divides by the layer's mean so that layers compare under global selection.

    Args:
        distance: ``l2``, ``l1`` or ``cosine`` (1 - cosine similarity), on raw weights.
        norm_share: share of every layer's channels that score below all others, by norm; in [0, 1).
        normalize: as `L1`.
        combine: see `Criterion`.

    Raises:
        ScoreError: unknown setting, or a share outside [0, 1).

    Example:
        >>> FPGM(distance="l1").channel_scores(torch.tensor([[0.0, 1.0], [1.0, 1.0], [5.0, 0.0]])).tolist()
        [7.0, 6.0, 11.0]
    """

    dead_score: ClassVar[float] = -1.0

    distance: Distance = "l2"
    norm_share: float = 0.0
    normalize: Normalizer = "mean"
    combine: Combine = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight("norm_share", self.norm_share)
        if self.norm_share >= 1:
            raise ScoreError(f"norm_share must be in [0, 1), got {self.norm_share!r}")

    def channel_scores(self, rows: Tensor) -> Tensor:
        return functional.geometric_median_distance(rows, self.distance)
