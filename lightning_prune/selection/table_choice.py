"""What a latency table's knapsack came to, in numbers and in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_prune.plan import Plan


@dataclass(frozen=True)
class TableChoice:
    """What a table's knapsack came to.

    Attributes:
        plan: the channels.
        kept: {group: how many}.
        value: sum of the scores kept; where some are negative, all are raised by the least.
        bound: no choice among the widths considered keeps more in that time, by the table.
        budget_ms: milliseconds allowed.
        measured_ms: of the reconstructed model, on the engine.
        dense_ms: of the dense model, likewise.
        models: how many were built and measured.
        elsewhere: the machine that the table is of, if it is not this one: then nothing was measured, and milliseconds
            are the table's, scaled by what the whole dense model took there.
    """

    plan: Plan
    kept: Mapping[str, int]
    value: float
    bound: float
    budget_ms: float
    measured_ms: float
    dense_ms: float
    models: int
    elsewhere: str | None = None

    @property
    def gap(self) -> float:
        """Share of the bound that may be missing."""
        return max(self.bound - self.value, 0.0) / self.bound if self.bound > 0 else 0.0

    def __str__(self) -> str:
        if all(len(group.keep) == group.size for group in self.plan.groups.values()):
            return f"within {self.budget_ms:g} ms all channels stay: the dense model takes {self.dense_ms:,.2f} ms"
        return (
            f"the most score kept within {self.budget_ms:g} ms by the table: {self.value:.5g} of at most "
            f"{self.bound:.5g} (gap {100 * self.gap:.1f} %), {'expected' if self.elsewhere else 'measured'} "
            f"{self.measured_ms:,.2f} ms, dense {self.dense_ms:,.2f} ms"
            f"{f', on {self.elsewhere}: measure it there' if self.elsewhere else ''}"
        )
