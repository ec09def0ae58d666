"""How labels pass through operators that sum over channels: convolutions and matrix products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.graph.constraints import Grid, Grouped, Place, Size
from lightning_prune.graph.elementwise import Operand, combine
from lightning_prune.graph.labels import NO_LABEL, Info, LabelSpace, region, signature, spread


@dataclass(frozen=True)
class Call:
    """One contraction of data with a weight: who ran it, when, what it read and what it made (label values)."""

    module: str
    when: tuple[int, int]  # run, position in it
    reads: Tensor
    makes: Tensor


def fold(space: LabelSpace, layer: Tensor, keep: tuple[int, ...], where: str) -> Tensor | None:
    """The layer along the dimensions ``keep`` only; what varies along the others is tied to go together."""
    dims = signature(layer)
    if set(dims) <= set(keep):
        return layer
    kept = [d for d in dims if d in keep]
    if not kept:
        return None
    core = region(layer, dims)
    rows = core.permute(*kept, *(d for d in range(layer.dim()) if d not in kept))
    shape = rows.shape[: len(kept)]
    rows = rows.reshape(shape.numel(), -1)
    gaps = (rows == NO_LABEL).any(1)
    if gaps.any():
        space.freeze(rows[gaps], f"goes together with channels that stay in {where}")
    whole = rows[~gaps]
    space.tie(whole[:, :1].expand_as(whole) >> 1, whole >> 1)
    values = torch.where(gaps, NO_LABEL, rows[:, 0] | (rows & 1).amax(1))
    view = [layer.shape[d] if d in kept else 1 for d in range(layer.dim())]
    return values.view(shape).view(view).expand(layer.shape)


def merge_along(space: LabelSpace, layers: list[Tensor], size: int, dim: int) -> Tensor:
    """(size,) label values of layers that vary along ``dim`` only, tied with each other; -1 without any."""
    found: Tensor | None = None
    for layer in layers:
        values = region(layer, (dim,)).flatten()
        if found is None:
            found = values
        else:
            both = (found != NO_LABEL) & (values != NO_LABEL)
            space.tie(found[both] >> 1, values[both] >> 1)
            found = torch.where(found == NO_LABEL, values, found)
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
    if not live.any():
        return
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
    place: Place,
) -> tuple[Info, Tensor, Tensor]:
    """Labels of a convolution without its bias; also (what it reads, what it makes) as label values."""
    (x_shape, x_info), (w_shape, w_info) = x, weight
    out_dim, in_dim = (1, 0) if transposed else (0, 1)
    reads = merge_along(space, _channel_layers(space, x_info, place.where), x_shape[1], 1)
    w_layers = _weight_layers(space, w_info, place.where)
    w_out = merge_along(space, w_layers[out_dim], w_shape[out_dim], out_dim)
    w_in = merge_along(space, w_layers[in_dim], w_shape[in_dim], in_dim)
    reads_weight = not w_info.data
    makes = filters = w_out
    if groups == 1:
        contract(space, reads, w_in, reads_weight=reads_weight, where=place.where)
    elif groups == x_shape[1]:
        # Depthwise: each input channel has filters of its own, which go with it and being masked read only zeros.
        filters = w_in if transposed else w_out
        makes = w_in.repeat_interleave(w_shape[1]) if transposed else w_out
        own = filters.view(groups, -1)
        _tie_or_freeze(space, reads.view(-1, 1).expand_as(own), own, place.where)
        space.sizes.append(Size(reads, place, attribute="groups"))
    elif transposed:
        contract(space, reads, w_in, reads_weight=reads_weight, where=place.where)
        space.constraints.append(Grid(reads.view(groups, -1), (1,), place, exact=True))
        makes = w_out.repeat(groups)
    else:
        inner = w_in.expand(groups, -1).flatten()
        space.freeze(inner[reads == NO_LABEL], f"reads an input of fixed size in {place.where}")
        live = (reads != NO_LABEL) & (reads & 1 == 1)
        space.mark("must_mask", inner[live & (inner & 1 == 0)])
        space.freeze(inner[live & (inner & 1 == 1)], f"is a constant that nothing can mask in {place.where}")
        if reads_weight:
            space.mark("reader", w_in)
        space.constraints.append(Grouped(reads.view(groups, -1), w_in, w_out.view(groups, -1), place))
    if reads_weight:
        space.mark("filter", filters)
    layers = (spread(makes, output, 1),) if output[1] > 1 and (makes != NO_LABEL).any() else ()
    return Info(layers, data=True), reads, makes


def _channel_layers(space: LabelSpace, info: Info, where: str) -> list[Tensor]:
    """Layers of a convolution's input along its channels; positions that vary too go together."""
    layers = []
    for layer in info.layers:
        if 1 in signature(layer):
            layers.append(fold(space, layer, (1,), where))
        else:
            space.freeze(layer, f"varies over the positions that {where} slides over")
    return [layer for layer in layers if layer is not None]


def _weight_layers(space: LabelSpace, info: Info, where: str) -> dict[int, list[Tensor]]:
    """Layers of a convolution's weight, by the dimension along which they vary."""
    found: dict[int, list[Tensor]] = {0: [], 1: []}
    for layer in info.layers:
        dims = signature(layer)
        if dims in ((0,), (1,)):
            found[dims[0]].append(layer)
        else:
            space.freeze(layer, f"varies over the kernel of {where}")
    return found


def _tie_or_freeze(space: LabelSpace, data: Tensor, weight: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """Tie channels to the weights that read them, return both; where one side has no labels the other must stay."""
    if min(int(data.min()), int(weight.min())) >= 0:
        space.tie(data >> 1, weight >> 1)
        return data, weight
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
    """Labels of ``left @ right``, (n, k) @ (k, m) or (b, n, k) @ (b, k, m); also (what it reads, what it makes)."""
    (l_shape, l_info), (r_shape, r_info) = left, right
    rank = len(output)
    row, column = rank - 2, rank - 1
    pure = any(signature(layer) == (dim,) for info, dim in ((l_info, column), (r_info, row)) for layer in info.layers)
    l_inner, l_free = _inner_and_free(space, l_info, l_shape, column, pure, where)
    r_inner, r_free = _inner_and_free(space, r_info, r_shape, row, pure, where)
    rows = merge_along(space, [layer for layer in l_free if signature(layer) == (row,)], l_shape[row], row)
    columns = merge_along(space, [layer for layer in r_free if signature(layer) == (column,)], r_shape[column], column)
    if l_info.data or not r_info.data:
        reads, weight, makes = l_inner, r_inner, columns
    else:
        reads, weight, makes = r_inner, l_inner, rows
    one_weight = l_info.data != r_info.data
    contract(space, reads, weight, reads_weight=one_weight, where=where)
    if one_weight:
        space.mark("filter", makes)
    operands = []
    for shape, info, free, inner in ((l_shape, l_info, l_free, column), (r_shape, r_info, r_free, row)):
        flat = torch.Size([1 if d == inner else size for d, size in enumerate(shape)])
        layers = tuple(region(layer, signature(layer)).expand(flat) for layer in free)
        operands.append(Operand(flat, Info(layers, data=info.data)))
    info = combine(space, operands, output, any, where)
    return Info(info.layers, data=l_info.data or r_info.data), reads, makes


def _inner_and_free(
    space: LabelSpace, info: Info, shape: torch.Size, inner: int, pure: bool, where: str
) -> tuple[Tensor, list[Tensor]]:
    """Label values along the dimension that is summed over, and the layers that do not vary along it.

    A layer that varies along it and others (heads and their width) is tied along one: along the others if any
    operand has channels there alone, else along the sum, so that whole rows go.
    """
    along: list[Tensor] = []
    free: list[Tensor] = []
    for layer in info.layers:
        dims = signature(layer)
        if inner not in dims:
            free.append(layer)
        elif dims == (inner,):
            along.append(layer)
        else:
            keep = (inner,) if pure else tuple(d for d in dims if d != inner)
            folded = fold(space, layer, keep, where)
            if folded is not None:
                (along if pure else free).append(folded)
    return merge_along(space, along, shape[inner], inner), free
