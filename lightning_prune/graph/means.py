"""Means over channels that are zero when masked, and what can make up for it when they count fewer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_prune.graph.labels import Labels, TensorInfo


@dataclass(frozen=True)
class Form:
    """What is multiplied, by which power of C / C': an eps, and a weight (after adding ``offset`` to it)."""

    eps: str | None
    eps_power: float
    weight: str | None  # None: what the module returns
    power: float
    offset: float = 0.0

    @property
    def changes(self) -> bool:
        """Whether anything is multiplied at all."""
        return self.eps is not None or self.weight is not None

    def factors(self, before: int, after: int) -> tuple[float, float]:
        """Of the eps and of the weight, if ``after`` of ``before`` channels are left."""
        return (before / after) ** self.eps_power, (before / after) ** self.power


@dataclass(frozen=True)
class Argument:
    """A tensor that a module was called on or returned: its shape and its channels."""

    shape: torch.Size
    labels: tuple[Labels, ...]


@dataclass(frozen=True)
class ModuleCall:
    """What a module was called on, `Argument` for a tensor, and what it returned."""

    args: tuple[Any, ...]
    outputs: tuple[Argument, ...]


@dataclass
class Mean:
    """The means that one module takes over channels: over which ids (n,), and where; its first call.

    sums: it takes sums only, which its code may divide by the number of channels.
    """

    ids: list[Tensor] = field(default_factory=list)
    where: str = ""
    call: ModuleCall | None = None
    sums: bool = True

    def add(self, ids: Tensor, where: str, *, is_sum: bool) -> None:
        """One more, if not over the same."""
        self.where = self.where if self.where and (is_sum or not self.sums) else where
        self.sums = self.sums and is_sum
        if not any(torch.equal(ids, other) for other in self.ids):
            self.ids.append(ids)

    def met(self, args: tuple[Any, ...], outputs: Sequence[Tensor], infos: Sequence[TensorInfo]) -> None:
        """The module's call ended. infos: of the tensors among ``args``, then of the outputs."""
        if self.call is None:
            known = iter(infos)
            seen = tuple(Argument(a.shape, next(known).labels) if isinstance(a, Tensor) else a for a in args)
            self.call = ModuleCall(seen, tuple(Argument(output.shape, next(known).labels) for output in outputs))
