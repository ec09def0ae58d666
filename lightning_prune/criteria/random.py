"""Random scores: the baseline that every criterion has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_prune.criteria.base import Criterion, Member
from lightning_prune.criteria.functional import mixed_generator
from lightning_prune.criteria.number_checks import check_seed


@final
@dataclass(frozen=True, kw_only=True)
class Random(Criterion):
    """Uniform scores in [0, 1), fixed by the seed.

    Needs nothing. Each layer draws from its own generator, seeded by ``seed`` and the layer's name: scores
    depend neither on the global random state nor on which other layers exist. Layers of a group draw
    independently (what ``coupling="union"`` wants); the group itself takes the scores of its first layer,
    because a mean over members is no longer uniform and would spare large groups under global selection.

    Args:
        seed: from 0 to 2**31 - 1.

    Raises:
        ScoreError: seed out of range.

    Example:
        >>> Random(seed=3)
        Random(seed=3)
    """

    combine = "first"

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)

    def scores(self, members: Sequence[Member]) -> list[Tensor]:
        generators = [mixed_generator(self.seed, member.group, member.layer.name) for member in members]
        sizes = [len(member.layer.index) for member in members]
        return [torch.rand(n, dtype=torch.float64, generator=g) for n, g in zip(sizes, generators, strict=True)]
