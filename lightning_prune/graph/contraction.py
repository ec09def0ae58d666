"""How labels pass through operators that sum over channels: convolutions and matrix products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.graph.labels import NO_LABEL, Info, LabelSpace, region, signature, spread


@dataclass(frozen=True)
class Call:
    """One contraction of data with a weight: who ran it, what it read and what it made (label values)."""

    module: str
    order: int
    reads: Tensor
    makes: Tensor


def along(space: LabelSpace, info: Info, size: int, dim: int, where: str) -> Tensor:
    """(size,) label values along one dimension, -1 without labels; layers that also vary elsewhere are frozen."""
    found: Tensor | None = None
    for layer in info.layers:
        dims = signature(layer)
        if dims == (dim,):
            values = region(layer, dims).flatten()
            if found is not None:
                space.tie(found >> 1, values >> 1)
            found = values if found is None else found
        elif dim in dims:
            space.freeze(layer, f"varies over more than the channels read by {where}")
    return torch.full((size,), NO_LABEL) if found is None else found


def contract(space: LabelSpace, data: Tensor, weight: Tensor, *, reads_weight: bool, where: str) -> None:
    """Tie the two sides of a sum over channels. data, weight: label values of equal length.

    A masked channel that is not zero here (a sigmoid's 0.5, say) adds nothing only if the weight that reads it
    is masked too.
    """
    data, weight = _tie_or_freeze(space, data, weight, where)
    if reads_weight:
        space.mark("reader", weight)
    live = (data & 1).bool()
    space.mark("must_mask", weight[live & (weight & 1 == 0)])
    space.freeze(weight[live & (weight & 1 == 1)], f"is a constant that nothing can mask in {where}")


def convolution(
    space: LabelSpace,
    x: tuple[torch.Size, Info],
    weight: tuple[torch.Size, Info],
    output: torch.Size,
    *,
    groups: int,
    transposed: bool,
    where: str,
) -> tuple[Info, Tensor, Tensor]:
    """Labels of a convolution without its bias; also (what it reads, what it makes) as label values."""
    (x_shape, x_info), (w_shape, w_info) = x, weight
    out_dim, in_dim = (1, 0) if transposed else (0, 1)
    _freeze_others(space, x_info, 1, f"varies over the positions that {where} slides over")
    _freeze_others(space, w_info, (out_dim, in_dim), f"varies over the kernel of {where}")
    reads = along(space, x_info, x_shape[1], 1, where)
    w_out = along(space, w_info, w_shape[out_dim], out_dim, where)
    w_in = along(space, w_info, w_shape[in_dim], in_dim, where)
    reads_weight = not w_info.data
    if groups == 1:
        contract(space, reads, w_in, reads_weight=reads_weight, where=where)
    elif transposed:
        for values in (reads, w_in, w_out):
            space.freeze(values, f"passes a grouped transposed convolution in {where}")
    elif w_shape[1] == 1:
        _depthwise(space, reads, w_out, where)
    else:
        for part in reads.view(groups, -1):
            contract(space, part, w_in, reads_weight=reads_weight, where=where)
        # Groups must stay equal in size, so the same position goes in each of them.
        positions = w_out.view(groups, -1)
        if (w_out != NO_LABEL).all():
            space.tie(positions[:1].expand_as(positions) >> 1, positions >> 1, own=True)
    if reads_weight:
        space.mark("filter", w_out)
    layers = (spread(w_out, output, 1),) if output[1] > 1 and (w_out != NO_LABEL).any() else ()
    return Info(layers, data=True), reads, w_out


def _depthwise(space: LabelSpace, reads: Tensor, w_out: Tensor, where: str) -> None:
    """Each input channel has filters of its own: they go with it, and being masked they read only zeros."""
    filters = w_out.view(len(reads), -1)
    _tie_or_freeze(space, reads.view(-1, 1).expand_as(filters), filters, where)


def _tie_or_freeze(space: LabelSpace, data: Tensor, weight: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """Tie channels to the weights that read them, return both; where one side has no labels the other must stay."""
    both = (data != NO_LABEL) & (weight != NO_LABEL)
    space.freeze(data[~both], f"is read by weights of fixed size in {where}")
    space.freeze(weight[~both], f"reads an input of fixed size in {where}")
    data, weight = data[both], weight[both]
    space.tie(data >> 1, weight >> 1)
    return data, weight


def matmul(
    space: LabelSpace,
    left: tuple[torch.Size, Info],
    right: tuple[torch.Size, Info],
    output: torch.Size,
    where: str,
) -> tuple[Info, Tensor, Tensor]:
    """Labels of ``left @ right``, (n, k) @ (k, m); also (what it reads, what it makes) as label values."""
    (l_shape, l_info), (r_shape, r_info) = left, right
    for info in (l_info, r_info):
        for layer in info.layers:
            if len(signature(layer)) > 1:
                space.freeze(layer, f"varies over both dimensions of a matrix product in {where}")
    inner_left = along(space, l_info, l_shape[1], 1, where)
    inner_right = along(space, r_info, r_shape[0], 0, where)
    rows = along(space, l_info, l_shape[0], 0, where)
    columns = along(space, r_info, r_shape[1], 1, where)
    if l_info.data or not r_info.data:
        reads, weight, makes = inner_left, inner_right, columns
    else:
        reads, weight, makes = inner_right, inner_left, rows
    one_weight = l_info.data != r_info.data
    contract(space, reads, weight, reads_weight=one_weight, where=where)
    if one_weight:
        space.mark("filter", makes)
    layers = [
        spread(values, output, dim)
        for dim, values in ((0, rows), (1, columns))
        if output[dim] > 1 and (values != NO_LABEL).any()
    ]
    return Info(tuple(layers), data=l_info.data or r_info.data), reads, makes


def _freeze_others(space: LabelSpace, info: Info, keep: int | tuple[int, ...], reason: str) -> None:
    allowed = {keep} if isinstance(keep, int) else set(keep)
    for layer in info.layers:
        if not set(signature(layer)) <= allowed:
            space.freeze(layer, reason)
