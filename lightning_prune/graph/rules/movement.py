"""Operators that move elements: most are simply executed on the labels.

Sizes that the model's Python code passes along (of a view, of the pieces of a split) cannot be seen through; they
are recorded as constraints, see `lightning_prune.graph.constraints`.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from lightning_prune.graph.constraints import Cut, Grid, Merge
from lightning_prune.graph.contraction import fold
from lightning_prune.graph.elementwise import Operand, combine
from lightning_prune.graph.labels import NO_LABEL, Info, collapse, region, signature, spread
from lightning_prune.graph.operator_call import Context


def movement(c: Context) -> Info:
    """Operators that only rearrange: executed on the labels."""
    info = c.info(c.args[0])
    # detach: an in-place transposition must not turn the layer that others share.
    layers = tuple(collapse(c.func(layer.detach(), *c.args[1:], **c.kwargs)) for layer in info.layers)
    return Info(tuple(layer for layer in layers if signature(layer)), data=info.data, uniform=info.uniform)


def expansion(c: Context) -> Info:
    """``expand``: sizes of labelled dimensions may be written in the code."""
    info = movement(c)
    for layer in info.layers:
        _sizes(c, layer)
    return info


def view(c: Context) -> Info:
    """Reshaping. Channels that are laid out over several dimensions may lose whole slices along one of them."""
    info = c.info(c.args[0])
    layers = []
    for layer in info.layers:
        viewed = collapse(layer.reshape(c.output.shape))
        dims = signature(viewed)
        if not dims:
            continue
        layers.append(viewed)
        _sizes(c, viewed)
    return Info(tuple(layers), data=info.data, uniform=info.uniform)


_SIZES_FROM_INPUT = tuple(
    f"torch.nn.modules.{name}"
    for name in ("linear.", "flatten.Flatten", "conv.", "batchnorm.", "instancenorm.", "pooling.")
)


def _sizes(c: Context, layer: Tensor) -> None:
    """Remember sizes that the code may have passed; most of torch's own layers take theirs from the input."""
    if c.place.kind.startswith(_SIZES_FROM_INPUT):
        return
    dims = signature(layer)
    values = region(layer, dims).reshape([layer.shape[d] for d in dims])
    key = (*c.place.stack[:1], values.shape, values.numpy().tobytes())
    if key not in c.space.seen:  # one line of code, or several that pass the same sizes
        c.space.seen.add(key)
        whole = len(dims) > 1
        c.space.constraints.append(Grid(values, tuple(range(len(dims))), c.place) if whole else Merge(values, c.place))


def selection(c: Context) -> Info | list[Info]:
    """slice, select, split: free across the channels; along them the bounds are sizes of the code."""
    tensor = c.args[0]
    info = c.info(tensor)
    dim = c.argument("dim", 0) % max(tensor.dim(), 1)
    several = isinstance(c.output, (list, tuple))
    count = len(c.output) if several else 1
    kept: list[list[Tensor]] = [[] for _ in range(count)]
    pieces = _pieces(c, dim)
    for layer in info.layers:
        moved = c.func(layer, *c.args[1:], **c.kwargs)
        moved = list(moved) if isinstance(moved, (list, tuple)) else [moved]
        if dim in signature(layer) and pieces != [(0, tensor.shape[dim])]:
            _cut(c, layer, dim, pieces)
        for part, into in zip(moved, kept, strict=True):
            part = collapse(part)
            if signature(part):
                into.append(part)
    infos = [Info(tuple(layers), data=info.data, uniform=info.uniform) for layers in kept]
    return infos if several else infos[0]


def _pieces(c: Context, dim: int) -> list[tuple[int, int]] | None:
    """(start, end) of each piece along the dimension; None: single elements or a step."""
    name = c.name
    size = c.args[0].shape[dim]
    if name in ("split", "split_with_sizes", "split_copy", "unsafe_split", "chunk"):
        bounds = [0]
        for piece in c.output:
            bounds.append(bounds[-1] + piece.shape[dim])
        return list(itertools.pairwise(bounds))
    if name in ("slice", "narrow"):
        if c.argument("step", 1) != 1:
            return None
        start = c.argument("start") or 0
        start = min(max(start + size if start < 0 else start, 0), size)
        return [(start, start + c.output.shape[dim])]
    return None


def _cut(c: Context, layer: Tensor, dim: int, pieces: list[tuple[int, int]] | None) -> None:
    dims = signature(layer)
    values = region(layer, dims)
    others = tuple(d for d in dims if d != dim)
    if not others:
        if pieces is None:
            c.space.freeze(layer, f"is taken by its number in {c.where}")
            return
        key = values.flatten()
        for known in reversed(c.space.constraints):
            if isinstance(known, Cut) and known.place.stack == c.place.stack and torch.equal(known.values, key):
                known.intervals += pieces
                return
        c.space.constraints.append(Cut(key, c.place, list(pieces), listed=len(pieces) > 1))
        return
    # Whole slices along the other dimensions may go; this one keeps its size, or every piece shrinks alike.
    grid = values.permute(*others, dim, *(d for d in range(layer.dim()) if d not in dims))
    grid = grid.reshape([layer.shape[d] for d in (*others, dim)])
    axes = tuple(range(len(others)))
    lengths = {end - start for start, end in pieces or []}
    if pieces and len(pieces) > 1 and len(lengths) == 1 and max(lengths) > 1:
        grid, axes = grid.unflatten(-1, (len(pieces), -1)), (*axes, len(others) + 1)
    c.space.constraints.append(Grid(grid, axes, c.place))


def index(c: Context) -> Info:
    """``x[indices]``: executed on the labels; channels that are picked by number stay."""
    tensor, indices = c.args[0], c.argument("indices")
    info = c.info(tensor)
    used = set()
    position = 0
    for item in indices:
        width = item.dim() if item is not None and item.dtype in (torch.bool, torch.uint8) else 1
        if item is not None:
            used |= set(range(position, position + width))
        position += width
    layers = []
    for layer in info.layers:
        if used & set(signature(layer)):
            c.space.freeze(layer, f"is taken by its number in {c.where}")
        else:
            layers.append(collapse(c.func(layer, indices)))
    return Info(tuple(layer for layer in layers if signature(layer)), data=info.data, uniform=info.uniform)


def pick(c: Context) -> Info:
    """``index_select``, ``roll``, ``embedding``, ``unfold``: executed, unless channels themselves are picked."""
    tensor = c.args[0]
    info = c.info(tensor)
    used = _picked_dims(c, tensor)
    layers = []
    for layer in info.layers:
        if used & set(signature(layer)):
            c.space.freeze(layer, f"is taken by its number in {c.where}")
        else:
            layers.append(collapse(c.func(layer, *c.args[1:], **c.kwargs)))
    return Info(tuple(layer for layer in layers if signature(layer)), data=info.data, uniform=info.uniform)


def _picked_dims(c: Context, tensor: Tensor) -> set[int]:
    if c.name == "embedding":
        return {0}
    if c.name == "roll":
        dims = c.argument("dims") or range(tensor.dim())
        return {d % tensor.dim() for d in dims}
    return {c.argument("dimension" if c.name == "unfold" else "dim") % tensor.dim()}


def shuffle(c: Context) -> Info:
    """``channel_shuffle``: every group loses the same number of channels."""
    tensor, groups = c.args[0], c.argument("groups")
    info = c.info(tensor)
    for layer in info.layers:
        if signature(layer) == (1,):
            c.space.constraints.append(
                Grid(region(layer, (1,)).reshape(groups, -1), (1,), c.place, exact=True),
            )
        elif 1 in signature(layer):
            return c.freeze_inputs(f"varies over more than the channels shuffled by {c.where}")
    return movement(c)


def unfold_depth(c: Context) -> Info:
    """``pixel_shuffle``: the channels that become one channel's positions go together."""
    tensor, area = c.args[0], c.argument("upscale_factor") ** 2
    for layer in c.info(tensor).layers:
        if signature(layer) != (1,):
            return c.freeze_inputs(f"varies over more than the channels in {c.where}")
        c.space.constraints.append(Grid(region(layer, (1,)).reshape(-1, area), (0,), c.place, exact=True))
    return movement(c)


def patches(c: Context) -> Info:
    """``im2col``: every channel becomes its kernel positions, which follow each other."""
    info = c.info(c.args[0])
    area = c.output.shape[1] // c.args[0].shape[1]
    layers = []
    for layer in info.layers:
        if 1 in signature(layer) and (folded := fold(c.space, layer, (1,), c.where)) is not None:
            layers.append(spread(region(folded, (1,)).flatten().repeat_interleave(area), c.output.shape, 1))
        else:
            c.space.freeze(layer, f"varies over the positions that {c.where} collects")
    return Info(tuple(layers), data=info.data)


def unpatches(c: Context) -> Info:
    """``col2im``: the reverse; a channel's kernel positions go together."""
    info = c.info(c.args[0])
    channels = c.output.shape[1]
    layers = []
    for layer in info.layers:
        if 1 in signature(layer) and (flat := fold(c.space, layer, (1,), c.where)) is not None:
            grid = region(flat, (1,)).reshape(1, channels, -1)
            folded = fold(c.space, grid, (1,), c.where)
            if folded is not None:
                layers.append(spread(region(folded, (1,)).flatten(), c.output.shape, 1))
        else:
            c.space.freeze(layer, f"varies over the positions that {c.where} puts together")
    return Info(tuple(layers), data=info.data)


def concatenation(c: Context) -> Info:
    """``cat``: along the channels labels follow each other; across them the parts are tied."""
    parts = [part for part in c.argument("tensors") if part.dim() == c.output.dim()]
    return _join(c, parts, [c.info(part) for part in parts], c.argument("dim", 0) % c.output.dim())


def stack(c: Context) -> Info:
    """``stack``: the parts lie side by side in a new dimension, their channels are tied."""
    parts = list(c.argument("tensors"))
    dim = c.argument("dim", 0) % c.output.dim()
    infos = []
    for part in parts:
        info = c.info(part)
        infos.append(Info(tuple(layer.unsqueeze(dim) for layer in info.layers), info.data, info.uniform))
    return _join(c, [part.unsqueeze(dim) for part in parts], infos, dim)


def _join(c: Context, parts: list[Tensor], infos: list[Info], dim: int) -> Info:
    layers = list(_join_varied(infos, dim))
    along: list[Tensor] = []
    across: list[Operand] = []
    for part, info in zip(parts, infos, strict=True):
        values: Tensor | None = None
        others = []
        for layer in info.layers:
            dims = signature(layer)
            if dims == (dim,) and values is None:
                values = region(layer, dims).flatten()
            elif dim not in dims:
                others.append(layer.narrow(dim, 0, 1))
            elif not layers:
                c.space.freeze(layer, f"is joined along several dimensions by {c.where}")
        along.append(torch.full((part.shape[dim],), NO_LABEL) if values is None else values)
        shape = torch.Size([1 if d == dim else size for d, size in enumerate(part.shape)])
        across.append(Operand(shape, Info(tuple(others), data=info.data, uniform=info.uniform)))
    joined = torch.cat(along)
    shape = torch.Size([1 if d == dim else size for d, size in enumerate(c.output.shape)])
    if not layers:
        combined = combine(c.space, across, shape, all, c.where)
        layers = [layer.expand(c.output.shape) for layer in combined.layers]
    if (joined != NO_LABEL).any():
        layers.append(spread(joined, c.output.shape, dim))
    return Info(tuple(layers), data=any(info.data for info in infos))


def _join_varied(infos: list[Info], dim: int) -> list[Tensor]:
    """Parts of one layer each, some of which vary along ``dim`` and another dimension: joined as they are."""
    if not all(len(info.layers) == 1 for info in infos):
        return []
    layers = [info.layers[0] for info in infos]
    dims = {signature(layer) for layer in layers}
    if not any(dim in d and len(d) > 1 for d in dims):
        return []
    joined = collapse(torch.cat(layers, dim))
    return [joined] if signature(joined) else []


def padding(c: Context) -> Info:
    """``constant_pad_nd``: the padding itself has no labels."""
    info, pad = c.info(c.args[0]), list(c.argument("pad"))
    rank = c.args[0].dim()
    amounts = {rank - 1 - k // 2: (pad[k], pad[k + 1]) for k in range(0, len(pad), 2)}
    value = c.argument("value", 0)
    layers = []
    for layer in info.layers:
        dims = signature(layer)
        values = region(layer, dims)
        if value != 0:
            values = torch.where(values >= 0, values | 1, values)
        own = {d: amounts[d] for d in dims if any(amounts.get(d, ()))}
        if any(amount < 0 for pair in own.values() for amount in pair):
            c.space.freeze(layer, f"is cut at fixed places by {c.where}")
            continue
        if own:
            flat = [a for d in reversed(range(rank)) for a in own.get(d, (0, 0))]
            values = torch.constant_pad_nd(values, flat, NO_LABEL)
        layers.append(values.expand(c.output.shape))
    return Info(tuple(layers), data=info.data, uniform=info.uniform)
