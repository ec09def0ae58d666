"""How labels pass through operators that combine tensors element by element."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_prune.graph.label_space import LabelSpace
from lightning_prune.graph.labels import NO_LABEL, Labels, TensorInfo

# Says which operands give exactly zero: takes one bool per operand (True: the operand's element is zero).
# None: infinite, so that not even a masked weight behind it helps.
IsZero = Callable[[tuple[bool, ...]], "bool | None"]


@dataclass(frozen=True)
class Operand:
    """One tensor that enters: its shape and what is known of it."""

    shape: torch.Size
    info: TensorInfo


def combine(
    space: LabelSpace, operands: Sequence[Operand], shape: torch.Size, is_zero: IsZero, where: str
) -> TensorInfo:
    """Labels of ``f(operands)`` broadcast to ``shape``.

    Labels that vary along a common dimension lie on the same channels: they are tied, and an operand that has those
    extents without labels freezes them, since it cannot shrink with them.
    """
    data = any(operand.info.data for operand in operands)
    uniform = all(operand.info.uniform or not operand.shape.numel() > 1 for operand in operands)
    labels = [
        (index, one.expand(shape)) for index, operand in enumerate(operands) for one in operand.info.labels if one.dims
    ]
    combined = [_merge(space, operands, part, shape, is_zero, where) for part in _overlapping(labels)]
    return TensorInfo(tuple(one for one in combined if one is not None), data, uniform and not combined)


Indexed = list[tuple[int, Labels]]  # with the number of their operand


def _overlapping(labels: Indexed) -> list[Indexed]:
    """Grouped so that labels of different groups vary along different dimensions."""
    parts: list[tuple[set[int], Indexed]] = []
    for index, one in labels:
        dims, members = set(one.dims), [(index, one)]
        apart = []
        for other_dims, others in parts:
            if other_dims & dims:
                dims |= other_dims
                members = others + members
            else:
                apart.append((other_dims, others))
        parts = [*apart, (dims, members)]
    return [members for _, members in parts]


def _merge(
    space: LabelSpace, operands: Sequence[Operand], part: Indexed, shape: torch.Size, is_zero: IsZero, where: str
) -> Labels | None:
    dims = sorted({d for _, one in part for d in one.dims})
    present = [index for index, _ in part]
    labels = [one.region(dims) for _, one in part]
    ids = torch.stack([one.ids for one in labels])
    for index, operand in enumerate(operands):
        if index not in present and not operand.info.uniform and _extends(operand.shape, shape, dims):
            space.freeze(ids, f"meets a tensor of fixed size in {where}")
            return None
    labelled: Any = ...
    if int(ids.min()) == NO_LABEL:  # where only some operands are labelled (padding, concatenation), nothing can go
        labelled = (ids != NO_LABEL).all(0)
        space.freeze(ids[:, ~labelled], f"meets channels of fixed number in {where}")
    live = _live(space, labels, ids, lambda zeros: is_zero(_by_operand(zeros, present, len(operands))), where)
    if len(part) == 1 and live is None:
        return part[0][1]  # as it came in

    data = [k for k, index in enumerate(present) if operands[index].info.data]
    own = len(data) <= 1
    lead = data[0] if data else 0
    for k in range(len(ids)):
        if k != lead:
            space.tie(ids[lead][labelled], ids[k][labelled], own=own)
    out = ids[lead]
    if not own and any(not torch.equal(out, ids[k]) for k in data):
        # An addition's result is no layer's own: what normalises it belongs to the whole group.
        out = space.fresh(out.numel()).view(out.shape)
        space.tie(out[labelled], ids[lead][labelled])
    merged = Labels(out if labelled is ... else torch.where(labelled, out, NO_LABEL), False if live is None else live)
    return merged.expand(shape)


def _extends(own: torch.Size, shape: torch.Size, dims: Sequence[int]) -> bool:
    """Whether an operand of size ``own`` really has extents along the output dimensions ``dims``."""
    offset = len(shape) - len(own)
    return any(d >= offset and own[d - offset] > 1 for d in dims)


def _by_operand(zeros: Sequence[bool], present: Sequence[int], operands: int) -> tuple[bool, ...]:
    """Two labels of one operand on the same channels: zero if either is."""
    return tuple(any(zero for zero, index in zip(zeros, present, strict=True) if index == k) for k in range(operands))


def _live(space: LabelSpace, labels: Sequence[Labels], ids: Tensor, is_zero: IsZero, where: str) -> Tensor | None:
    """Where the result may differ from zero once the channel is masked; None: nowhere."""
    live = torch.stack(torch.broadcast_tensors(*(one.live for one in labels)))
    patterns = live[None] if live.dim() == 1 else live.flatten(1).unique(dim=1).t()
    if len(patterns) == 1:
        live = patterns[0]
    found = None
    for pattern in patterns:
        zero = is_zero(tuple(not flag for flag in pattern.tolist()))
        if zero:
            continue
        here = (live == pattern.view(-1, *[1] * (live.dim() - 1))).all(0)
        found = here if found is None else found | here
        if zero is None:
            space.freeze(ids[:, here], f"is infinite when masked in {where}")
    return found
