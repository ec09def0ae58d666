"""Random scores: the baseline that every criterion has to beat."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from lightning_prune.criteria.base import Criterion, Member
from lightning_prune.criteria.settings import check_seed


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

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed(self.seed)

    @override
    def scores(self, members: Sequence[Member]) -> list[Tensor]:
        return [self._draw(member) for member in members]

    def _draw(self, member: Member) -> Tensor:
        # The CPU generator sees 32 bits of its seed: seed and name have to be mixed, not concatenated.
        digest = hashlib.sha256(f"{self.seed}/{member.group}/{member.layer.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
        return torch.rand(len(member.layer.index), dtype=torch.float64, generator=generator)
