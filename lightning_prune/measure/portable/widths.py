"""Which numbers of channels are timed, and what stands between them.

Engines compute channels in lanes: a width costs what the next multiple of the lane costs. And some take a slower way
for widths that are no multiple of an alignment (ONNX Runtime on x86 for channels in that are no multiple of 4). Both
are found by timing 33 neighbouring widths, not assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

FIRST, LAST = 64, 96  # widths probed
OUTLIER = 0.5  # relative to the median time: what is further off was disturbed
EVIDENCE = 0.1  # an alignment must explain this much: errors smaller by its exponential
_POWERS = (1, 2, 4, 8, 16, 32)
_SHARES = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125, 0.0625)  # of the largest width
_COARSE = (1.0, 0.5, 0.25)


class Steps(NamedTuple):
    """How time depends on a width, in one dimension.

    alignment: multiples of it are one class, the others another; 1: all are one class.
    aligned, others: lanes of the two classes.
    """

    alignment: int = 1
    aligned: int = 1
    others: int = 1


def find_steps(milliseconds: Sequence[float]) -> Steps:
    """From the times of the widths FIRST to LAST: the steps that explain them best.

    Each class is a straight line over widths rounded up to its lane, or a value for every lane; candidates are compared
    by the Bayesian information criterion of absolute errors, outliers cut, and among equals the smaller step wins.

    >>> find_steps([-(-width // 16) * 0.1 for width in range(FIRST, LAST + 1)])
    Steps(alignment=1, aligned=16, others=1)
    >>> find_steps([width * (0.1 if width % 4 == 0 else 0.2) for width in range(FIRST, LAST + 1)])
    Steps(alignment=4, aligned=4, others=1)
    """
    times = np.asarray(milliseconds, dtype=float)
    widths = np.arange(FIRST, LAST + 1)
    best, found = np.inf, Steps()
    for alignment in _POWERS:
        aligned = widths % alignment == 0
        if aligned.sum() < 3:
            break
        for lane, error, values in _fits(widths[aligned], times[aligned], alignment, 0):
            for others, others_error, others_values in _fits(widths[~aligned], times[~aligned], 1, 1):
                mean = max((error + others_error) / len(widths), 0.01 * float(np.median(times)))  # no clock is better
                score = len(widths) * np.log(mean) + (values + others_values) * np.log(len(widths))
                score += len(widths) * (alignment > 1) * EVIDENCE
                if score < best - 1e-9:
                    best, found = score, Steps(alignment, lane, others)
    return found


def _fits(widths: np.ndarray, times: np.ndarray, least: int, offset: int) -> list[tuple[int, float, int]]:
    """Of every lane: the sum of absolute errors, and of how many values."""
    if not len(widths):
        return [(1, 0.0, 0)]
    most = OUTLIER * float(np.median(times))
    found = []
    for lane in _POWERS:
        if lane < least:
            continue
        x = rounded_up(widths, lane, offset)
        ends = set(x.tolist())
        slope = _slope(x, times)
        found.append((lane, _error(times - slope * x, most), 2))
        if 2 < len(ends) <= 5:
            found.append((lane, sum(_error(times[x == end], most) for end in ends), len(ends)))
    return found


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    """Of Theil and Sen: the median over all pairs."""
    first, second = np.triu_indices(len(x), 1)
    apart = x[second] != x[first]
    first, second = first[apart], second[apart]
    return float(np.median((y[second] - y[first]) / (x[second] - x[first]))) if len(first) else 0.0


def _error(times: np.ndarray, most: float) -> float:
    """Sum of absolute distances from the median, none above the most."""
    return float(np.minimum(np.abs(times - np.median(times)), most).sum())


def rounded_up(widths: np.ndarray, lane: int, offset: int) -> np.ndarray:
    """To the next multiple of the lane less the offset: 1 for widths that must not be multiples themselves.

    >>> rounded_up(np.array([3, 15, 17]), 16, 0).tolist(), rounded_up(np.array([3, 15, 17]), 16, 1).tolist()
    ([16, 16, 32], [15, 15, 31])
    """
    return -(-(widths + offset) // lane) * lane - offset


def grid(largest: int, steps: Steps, aligned: bool, coarse: bool = False) -> list[int]:
    """Widths to time: of one class, at its lanes, up to the largest that a layer has.

    >>> grid(256, Steps(4, 16, 1), True), grid(256, Steps(4, 16, 1), False, coarse=True)
    ([16, 32, 64, 96, 128, 192, 256], [15, 17, 63, 127, 255])
    """
    if largest <= 4:
        return [width for width in range(1, largest + 1) if (width % steps.alignment == 0) == aligned]
    lane = steps.aligned
    anchors = {max(lane, round(share * largest / lane) * lane) for share in (_COARSE if coarse else _SHARES)} | {lane}
    last = largest - largest % steps.alignment
    if aligned:
        return sorted({min(width, last) for width in (*anchors, 2 * lane)} | {last}) if last else []
    widths = np.array([*(anchor - 1 for anchor in anchors), lane + 1, largest])
    rounded = np.minimum(rounded_up(widths, steps.others, 1), largest).tolist()
    return sorted({width for width in rounded if width > 0 and width % steps.alignment})
