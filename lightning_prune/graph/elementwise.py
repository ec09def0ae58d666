"""How labels pass through operators that combine tensors element by element."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_prune.graph.labels import NO_LABEL, Info, LabelSpace, region, signature

# Says which label patterns give exactly zero: takes one bool per operand (True: the operand's element is zero).
# None: infinite, so that not even a masked weight behind it helps.
IsZero = Callable[[tuple[bool, ...]], "bool | None"]


@dataclass(frozen=True)
class Operand:
    """One tensor that enters: its shape and what is known of it."""

    shape: torch.Size
    info: Info


def combine(space: LabelSpace, operands: Sequence[Operand], shape: torch.Size, is_zero: IsZero, where: str) -> Info:
    """Labels of ``f(operands)`` broadcast to ``shape``.

    Layers whose signatures intersect lie on the same channels: they are tied, and an operand that has those
    extents without labels freezes them, since it cannot shrink with them.
    """
    data = any(operand.info.data for operand in operands)
    uniform = all(operand.info.uniform or not operand.shape.numel() > 1 for operand in operands)
    layers = [
        (index, layer.expand(shape))
        for index, operand in enumerate(operands)
        for layer in operand.info.layers
        if signature(layer)
    ]
    combined = [_merge(space, operands, part, shape, is_zero, where) for part in _components(layers)]
    return Info(tuple(layer for layer in combined if layer is not None), data=data, uniform=uniform and not combined)


def _components(layers: list[tuple[int, Tensor]]) -> list[list[tuple[int, Tensor]]]:
    """Layers grouped so that signatures of different groups are disjoint."""
    parts: list[tuple[set[int], list[tuple[int, Tensor]]]] = []
    for index, layer in layers:
        dims, members = set(signature(layer)), [(index, layer)]
        apart = []
        for other_dims, other in parts:
            if other_dims & dims:
                dims |= other_dims
                members = other + members
            else:
                apart.append((other_dims, other))
        parts = [*apart, (dims, members)]
    return [members for _, members in parts]


def _merge(
    space: LabelSpace,
    operands: Sequence[Operand],
    part: list[tuple[int, Tensor]],
    shape: torch.Size,
    is_zero: IsZero,
    where: str,
) -> Tensor | None:
    dims = tuple(sorted({d for _, layer in part for d in signature(layer)}))
    present = [index for index, _ in part]
    size = [shape[d] if d in dims else 1 for d in range(len(shape))]
    values = torch.stack([region(layer, dims).expand(size) for _, layer in part])
    for index, operand in enumerate(operands):
        if index not in present and not operand.info.uniform and _extends(operand.shape, shape, dims):
            space.freeze(values, f"meets a tensor of fixed size in {where}")
            return None
    labelled = None if int(values.min()) >= 0 else _without_gaps(space, values, where)
    live = _live(space, values, present, len(operands), is_zero, where)
    if len(part) == 1 and live is None:
        return part[0][1]  # as it came in

    ids = values >> 1
    data_layers = [k for k, index in enumerate(present) if operands[index].info.data]
    own = len(data_layers) <= 1
    lead = data_layers[0] if data_layers else 0
    for k, other in enumerate(ids):
        if k != lead:
            first, second = (ids[lead], other) if labelled is None else (ids[lead][labelled], other[labelled])
            space.tie(first, second, own=own)
    out = ids[lead]
    if not own and any(not torch.equal(out, ids[k]) for k in data_layers):
        # An addition's result is no layer's own: what normalises it belongs to the whole group.
        out = space.fresh(out.numel()).view(out.shape)
        space.tie(out if labelled is None else out[labelled], ids[lead] if labelled is None else ids[lead][labelled])
    merged = out * 2 if live is None else out * 2 + live
    return (merged if labelled is None else torch.where(labelled, merged, NO_LABEL)).expand(shape)


def _extends(own: torch.Size, shape: torch.Size, dims: tuple[int, ...]) -> bool:
    """Whether an operand of size ``own`` really has extents along the output dimensions ``dims``."""
    offset = len(shape) - len(own)
    return any(d >= offset and own[d - offset] > 1 for d in dims)


def _without_gaps(space: LabelSpace, values: Tensor, where: str) -> Tensor:
    """(region) where all operands are labelled; where only some are (padding, concatenation), nothing can go."""
    labelled = values != NO_LABEL
    gaps = labelled.any(0) & ~labelled.all(0)
    if gaps.any():
        space.freeze(values[:, gaps], f"meets channels of fixed number in {where}")
    return labelled.all(0)


def _live(
    space: LabelSpace, values: Tensor, present: list[int], operands: int, is_zero: IsZero, where: str
) -> Tensor | None:
    """(region) 1 where the result may differ from zero once the channel is masked; None: nowhere."""
    weights = (1 << torch.arange(len(values))).view(-1, *[1] * (values.dim() - 1))
    code = ((values & 1) * weights).sum(0)
    low, high = int(code.min()), int(code.max())
    live = None
    for pattern in [low] if low == high else code.unique().tolist():
        zeros = [False] * operands
        for k, index in enumerate(present):
            # Two layers of one operand on the same channels: zero if either is.
            zeros[index] = zeros[index] or not (pattern >> k) & 1
        result = is_zero(tuple(zeros))
        if result:
            continue
        live = torch.zeros_like(code) if live is None else live
        live[code == pattern] = 1
        if result is None:
            space.freeze(values[:, code == pattern], f"is infinite when masked in {where}")
    return live
