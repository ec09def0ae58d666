"""Checks of a criterion's numbers."""

from __future__ import annotations

import math

from lightning_prune.errors import ScoreError


def check_weight(argument: str, value: float) -> None:
    """Refuse a weight that is negative or not a finite number."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:
        raise ScoreError(f"{argument} must be a finite number >= 0, got {value!r}")


def check_integer(argument: str, value: object, accepted: str, least: int, most: float = math.inf) -> None:
    """Refuse anything but an integer from ``least`` to ``most``; ``accepted`` says the same in words."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ScoreError(f"{argument} must be {accepted}, got {value!r}")


def check_seed(seed: object) -> None:
    """Refuse what is no seed of a 32-bit generator."""
    check_integer("seed", seed, "an integer in [0, 2**31)", 0, 2**31 - 1)
