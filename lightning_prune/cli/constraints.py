"""What `prune` and `sensitivity` say of the channels that stay whatever is chosen: for selections, and as words."""

from __future__ import annotations

import argparse
import shlex
from typing import Any


def constraints_of(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of a `Selection`."""
    kept = {"round_to": options.round_to, "min_channels": options.min_channels}
    return {**kept, "ignore": tuple(options.ignore)}


def constraint_words(options: argparse.Namespace) -> list[str]:
    """The same as options, without those that are as they are anyway."""
    words = [f"--round-to {options.round_to}"] * (options.round_to != 1)
    words += [f"--min-channels {options.min_channels:g}"] * (options.min_channels != 1)
    return [*words, *(f"--ignore {shlex.quote(layer)}" for layer in options.ignore)]
