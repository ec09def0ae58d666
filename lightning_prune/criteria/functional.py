"""Tensor kernels of the criteria: weights to scores, activations and gradients to contributions. No modules.

Weights are scored in float64. Activations are summed over the positions of one sample in their own precision
(half precision is widened to float32 first) and leave the kernel in float64, so sums over samples do not drift.

Shapes: N samples, F filters, M positions (height times width; 1 behind a linear layer), k filters per channel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

Distance = Literal["l2", "l1", "cosine"]
Magnitude = Literal["abs", "square", "signed"]
Normalizer = Literal["none", "max", "mean", "l2", "minmax", "rank", "percentile", "lamp"]
Scope = Literal["layer", "network"]
Combine = Literal["mean", "sum", "max"]


BLOCK = 2**17  # numbers: a megabyte in float64, which stays in a processor's cache


def channel_rows(weight: Tensor, dim: int, index: Tensor) -> Tensor:
    """All weights of each channel as one vector, its filters concatenated: (channels, fan) float64."""
    return torch.cat(list(channel_blocks(weight, dim, index, len(index))))


def channel_blocks(weight: Tensor, dim: int, index: Tensor, channels: int | None = None) -> Iterator[Tensor]:
    """`channel_rows` some channels at a time, by default so many that a block stays small."""
    filters = weight.detach().movedim(dim, 0).flatten(1)
    index = index.to(filters.device)
    if channels is None:
        channels = max(1, BLOCK // max(1, filters.shape[1] * index.shape[1]))
    if index.shape[1] == 1 and torch.equal(index[:, 0], torch.arange(len(filters), device=index.device)):
        yield from (block.to(torch.float64) for block in filters.split(channels))
    else:
        yield from (filters[block].flatten(1).to(torch.float64) for block in index.split(channels))


def geometric_median_distance(rows: Tensor, distance: Distance = "l2") -> Tensor:
    """Sum of the distances of each row to all others: smallest at the geometric median restricted to the rows."""
    if distance == "cosine":
        unit = torch.nn.functional.normalize(rows, dim=1)
        pairs = 1 - unit @ unit.T
    elif distance == "l1":
        pairs = torch.cdist(rows, rows, p=1)
    else:
        # Distances do not move with the origin; centred rows lose fewer digits in |a|^2 + |b|^2 - 2ab.
        centred = rows - rows.mean(0)
        pairs = torch.cdist(centred, centred, compute_mode="use_mm_for_euclid_dist")
    pairs.fill_diagonal_(0)
    return pairs.sum(1)


def by_position(tensor: Tensor, channel_dim: int) -> Tensor:
    """Activations as (N, F, M)."""
    tensor = tensor.movedim(channel_dim, 1)
    return widened(tensor.unsqueeze(-1) if tensor.ndim == 2 else tensor.flatten(2))


def widened(tensor: Tensor) -> Tensor:
    """Half precision as float32."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def taylor(value: Tensor, gradient: Tensor, magnitude: Magnitude = "signed") -> Tensor:
    """Sum over positions of gradient times value, or of its absolute value or square: (N, F, M) to (N, F)."""
    if magnitude == "signed":
        return torch.linalg.vecdot(value, gradient).to(torch.float64)
    return apply_magnitude(value * gradient, magnitude).sum(-1).to(torch.float64)


def apply_magnitude(tensor: Tensor, magnitude: Magnitude) -> Tensor:
    """Absolute value, square, or the tensor itself."""
    if magnitude == "abs":
        return tensor.abs()
    return tensor.square() if magnitude == "square" else tensor


def gather_channels(partial: Tensor, index: Tensor) -> Tensor:
    """Sum what the k filters of each channel contribute: (N, F) and (channels, k) to (N, channels)."""
    return partial[:, index.to(partial.device)].sum(-1)


def normalize(scores: Tensor, how: Normalizer) -> Tensor:
    """Bring scores to a common range, order kept. The one place that knows every normaliser.

    ``none``: as they are. ``max``, ``mean``, ``l2``: divided by the largest, by the mean, or by the root of the sum of
    squares (Molchanov et al. 2016), in absolute value; zeros stay zero. ``minmax`` (Li et al. 2022, eqs. 10-11):
    (s - min) / (max - min). ``rank``: position in the order over n - 1, ties share the mean. ``percentile``: min-max
    between the 5th and 95th percentile, not clipped (clipping would make ties), so that one energetic channel does
    not squeeze all others towards 0. These three make a constant vector 0. ``lamp``: s_c^2 / sum of s_j^2 over all
    s_j >= s_c (Lee et al. 2021, there for single weights): the best channel of every layer scores 1, so no layer dies
    before the others.

    Example:
        >>> scores = torch.tensor([1.0, 9.0, 3.0]).double()
        >>> normalize(scores, "minmax").tolist(), normalize(scores, "rank").tolist()
        ([0.0, 1.0, 0.25], [0.0, 1.0, 0.5])
        >>> normalize(torch.tensor([3.0, 4.0]), "l2").tolist(), normalize(torch.tensor([1.0, 3.0]), "mean").tolist()
        ([0.6000000238418579, 0.800000011920929], [0.5, 1.5])
        >>> normalize(torch.tensor([1.0, 3.0]), "lamp").tolist()
        [0.10000000149011612, 1.0]
    """
    if how == "none" or not len(scores) or not torch.isfinite(scores).all():
        return scores  # not finite: refused with the layer's name by whoever asked; a rank would hide it
    if how in ("max", "mean", "l2"):
        scale = torch.linalg.vector_norm(scores) if how == "l2" else getattr(scores, how)()
        scale = scale.abs()  # what is worth less stays below
        return scores if scale == 0 else scores / scale
    if how == "lamp":
        squares, order = scores.square().sort()
        at_least = squares.flip(0).cumsum(0).flip(0)
        first = torch.searchsorted(squares, squares)  # ties have the same sum
        shares = squares / at_least[first] if scores.any() else squares
        return torch.zeros_like(scores).index_put_((order,), shares)
    if how == "rank":
        _, inverse, counts = torch.unique(scores, sorted=True, return_inverse=True, return_counts=True)
        last = counts.cumsum(0).to(scores.dtype)
        mean_rank = last - (counts.to(scores.dtype) + 1) / 2
        return torch.zeros_like(scores) if len(counts) == 1 else mean_rank[inverse] / (len(scores) - 1)
    low, high = scores.min(), scores.max()
    if how == "percentile" and high > low:
        five, ninety_five = torch.quantile(scores, torch.tensor([0.05, 0.95]).to(scores))
        if ninety_five > five:  # else nearly all are tied: the full range is the only scale left
            low, high = five, ninety_five
    return torch.zeros_like(scores) if high == low else (scores - low) / (high - low)


def normalize_scores(raw: Sequence[Tensor], how: Normalizer, scope: Scope = "layer") -> list[Tensor]:
    """Normalise scores within each layer, or over all layers of the network together.

    Under ``network`` they keep their order over the network: it matters where two kinds are then added (JRE), and
    where the members of a group are.
    """
    if scope == "layer" or not raw:
        return [normalize(scores, how) for scores in raw]
    together = normalize(torch.cat([scores.to(raw[0].device) for scores in raw]), how)
    return list(torch.split(together, [len(scores) for scores in raw]))


def mixed_generator(*parts: object) -> torch.Generator:
    """A generator of its own for each seed and name.

    That of the CPU sees 32 bits of its seed: they have to be mixed, not concatenated.
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def combine(members: Sequence[Tensor], how: Combine | Literal["first"]) -> Tensor:
    """One score per channel of a group from the scores of its member layers."""
    if how == "first":
        return members[0].clone()
    stacked = torch.stack([scores.to(members[0].device) for scores in members])
    return getattr(stacked, "amax" if how == "max" else how)(0)
