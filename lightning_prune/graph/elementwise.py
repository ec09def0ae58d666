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
    values = [
        (index, region(layer, dims).expand([shape[d] if d in dims else 1 for d in range(len(shape))]))
        for index, layer in part
    ]
    present = {index for index, _ in values}
    for index, operand in enumerate(operands):
        if index not in present and not operand.info.uniform and _extends(operand.shape, shape, dims):
            for _, value in values:
                space.freeze(value, f"meets a tensor of fixed size in {where}")
            return None
    _freeze_gaps(space, [value for _, value in values], where)

    ids = [value >> 1 for _, value in values]
    labelled = torch.stack([value != NO_LABEL for _, value in values]).all(0)  # the rest is frozen
    data_layers = [k for k, (index, _) in enumerate(values) if operands[index].info.data]
    own = len(data_layers) <= 1
    lead = data_layers[0] if data_layers else 0
    for k, other in enumerate(ids):
        if k != lead:
            space.tie(ids[lead][labelled], other[labelled], own=own)
    out = ids[lead]
    if not own and any(not torch.equal(out, ids[k]) for k in data_layers):
        # An addition's result is no layer's own: what normalises it belongs to the whole group.
        out = space.fresh(out.numel()).view(out.shape)
        space.tie(out[labelled], ids[lead][labelled])
    live, infinite = _live(values, len(operands), is_zero)
    if infinite.any():
        space.freeze(values[0][1][infinite], f"is infinite when masked in {where}")
    merged = torch.where(labelled, out * 2 + live, NO_LABEL)
    return merged.expand(shape)


def _extends(own: torch.Size, shape: torch.Size, dims: tuple[int, ...]) -> bool:
    """Whether an operand of size ``own`` really has extents along the output dimensions ``dims``."""
    offset = len(shape) - len(own)
    return any(d >= offset and own[d - offset] > 1 for d in dims)


def _freeze_gaps(space: LabelSpace, values: list[Tensor], where: str) -> None:
    """Where some operands are labelled and others not (after a concatenation or padding), nothing can go."""
    labelled = torch.stack([value != NO_LABEL for value in values])
    gaps = labelled.any(0) & ~labelled.all(0)
    if gaps.any():
        for value in values:
            space.freeze(value[gaps], f"meets channels of fixed number in {where}")


def _live(values: list[tuple[int, Tensor]], operands: int, is_zero: IsZero) -> tuple[Tensor, Tensor]:
    """(region) 1 where the result may differ from zero once the channel is masked; where it is infinite then."""
    code = torch.zeros_like(values[0][1])
    for k, (_, value) in enumerate(values):
        code |= (value & 1) << k
    live, infinite = torch.zeros_like(code), torch.zeros_like(code, dtype=torch.bool)
    for pattern in code.unique().tolist():
        zeros = [False] * operands
        for k, (index, _) in enumerate(values):
            # Two layers of one operand on the same channels: zero if either is.
            zeros[index] = zeros[index] or not (pattern >> k) & 1
        result = is_zero(tuple(zeros))
        live[code == pattern] = int(not result)
        infinite |= (code == pattern) & (result is None)
    return live, infinite
