"""The kept channels of one group, and the three ways in which layers of a group come together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor
from typing_extensions import Self

from lightning_prune.errors import PlanError, check_choice

Coupling = Literal["joint", "union", "intersection"]
MOST_CHANNELS = 1 << 24  # of a group: beyond every layer, and few enough to be listed


@dataclass(frozen=True)
class GroupPlan:
    """Kept channels of one group.

    Attributes:
        size: channels of the dense group.
        keep: channels that exist in the reconstructed model, ascending.
        layers: per member layer, the channels it keeps itself. Equal to ``keep`` when coupled jointly; a part of
            it under ``union`` (the rest are zero filters that fill the addition); possibly more under
            ``intersection``.
    """

    size: int
    keep: tuple[int, ...]
    layers: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not are_counts((self.size,)) or self.size > MOST_CHANNELS:
            raise PlanError(f"size must be a number of channels, got {self.size!r}")
        for name, kept in (("keep", self.keep), *self.layers.items()):
            if not isinstance(kept, tuple) or not are_counts(kept):
                raise PlanError(f"{name}: kept channels must be a tuple of integers >= 0, got {kept!r}")
            if list(kept) != sorted(set(kept)) or (kept and kept[-1] >= self.size):
                raise PlanError(
                    f"{name}: kept channels must be ascending, distinct and in [0, {self.size}), got {kept}"
                )

    @classmethod
    def whole(cls, size: int) -> Self:
        """All channels stay."""
        return cls(size, tuple(range(size)))

    @classmethod
    def of_masks(cls, keep: Tensor, layers: Mapping[str, Tensor]) -> Self:
        """What boolean masks of what stays say; keep, layers: (channels,)."""
        return cls(len(keep), numbers_of(keep), {name: numbers_of(mask) for name, mask in layers.items()})

    @property
    def removed(self) -> tuple[int, ...]:
        """Channels that the reconstructed model no longer has."""
        kept = set(self.keep)
        return tuple(channel for channel in range(self.size) if channel not in kept)

    def kept_by(self, layer: str) -> tuple[int, ...]:
        """Channels that a member layer keeps itself."""
        return self.layers.get(layer, self.keep)


def numbers_of(mask: Tensor) -> tuple[int, ...]:
    """The channels of which a boolean mask, (channels,), is true."""
    return tuple(mask.nonzero().flatten().tolist())


def are_counts(values: Iterable[object]) -> bool:
    """Whether all are integers of at least 0; a bool is none."""
    return all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values)


def check_coupling(coupling: str) -> None:
    """Refuse anything but the three couplings.

    Raises:
        PlanError: unknown coupling.
    """
    check_choice("coupling", coupling, Coupling, PlanError)
