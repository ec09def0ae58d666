"""Which widths of a group are worth choosing among, by a latency table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_prune.graph import Group
from lightning_prune.measure.latency_table import LatencyTable
from lightning_prune.measure.time_model import TimedLayer, Width

WIDTHS = 48  # of a group that the knapsack chooses among, at most


def widths_of(
    group: Group, groups: Sequence[Group], layers: Sequence[TimedLayer], table: LatencyTable, round_to: int, least: int
) -> NDArray[np.int64]:
    """Where the table steps, among widths that the engine likes and that are multiples of ``round_to``.

    The others take a slower way not only in their layers: between them ONNX Runtime, for one, then turns tensors into
    another layout and back, which no table of layers knows.
    """
    own = [layer for layer in layers if group.name in {**layer.into.parts, **layer.out.parts}]
    multiple = _multiple(group, own, table, round_to)
    every = np.unique([*range(-(-least // multiple) * multiple, group.size, multiple), group.size])
    names = {name for layer in layers for name in (*layer.into.parts, *layer.out.parts)}
    dense = {other.name: other.size for other in groups if other.name in names}
    whole, half = (_profile(own, group.name, every, dense, share) for share in (1.0, 0.5))
    return every[steps(every, whole + half)]


def _multiple(group: Group, layers: Sequence[TimedLayer], table: LatencyTable, round_to: int) -> int:
    """Of the user's choice and of the alignments of the layers on both sides; no more than the group has."""
    found = round_to
    for layer in layers:
        into, out = table.alignment(layer.kind)
        found = math.lcm(found, _aligned(layer.into, group.name, into), _aligned(layer.out, group.name, out))
    return found if found <= group.size else round_to


def _aligned(width: Width, group: str, alignment: int) -> int:
    """Of what a group's channels have to be a multiple, for a layer's to be one of its alignment."""
    times = width.parts[group][0] if group in width.parts else alignment
    return alignment // math.gcd(alignment, times)


def _profile(
    layers: list[TimedLayer], name: str, widths: NDArray[np.int64], dense: Mapping[str, int], share: float
) -> NDArray[np.float64]:
    """Milliseconds of a group's layers by its width, while all other groups keep a share."""
    kept: dict[str, Any] = {other: max(round(share * size), 1) for other, size in dense.items()}
    kept[name] = widths
    return np.asarray(sum((layer.at(kept) for layer in layers), np.zeros(len(widths))))


def steps(widths: NDArray[np.int64], times: NDArray[np.float64], most: int = WIDTHS) -> NDArray[np.int64]:
    """Which widths are worth choosing among: none that takes as long as a larger one, and those before a step.

    Args:
        widths: ascending.
        times: milliseconds at each.
        most: how many are left, about.

    Returns:
        Their positions, ascending; the widest and the fastest are among them.

    Example:
        >>> steps(np.arange(1, 9), np.array([1.0, 1, 1, 3, 2, 2, 2, 4]))  # widths 3, 7 and 8
        array([2, 6, 7])
    """
    least_later = np.minimum.accumulate(times[::-1])[::-1]
    good = np.flatnonzero(np.append(times[:-1] < least_later[1:], True))
    if len(good) <= most:
        return good
    # Of each stretch of widths the one that lies lowest under the slope of all.
    slope = (times[good[-1]] - times[good[0]]) / (widths[good[-1]] - widths[good[0]])
    height = times[good] - slope * widths[good]
    edges = np.linspace(widths[good[0]], widths[good[-1]], most)
    stretch = np.searchsorted(edges, widths[good], side="right")
    parts = (np.flatnonzero(stretch == number) for number in np.unique(stretch))
    return np.unique([good[0], *(good[part[height[part].argmin()]] for part in parts), good[-1]])
