"""How labels pass through operators that combine tensors element by element."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_prune.graph.labels import NO_LABEL, Labels, TensorInfo
from lightning_prune.graph.operator_call import OperatorCall

# Says which operands give exactly zero: takes one bool per operand (True: the operand's element is zero).
# A text: why not even a masked weight behind it helps.
_ALWAYS = torch.tensor(True)
IsZero = Callable[[tuple[bool, ...]], bool | str]


@dataclass(frozen=True)
class Operand:
    """One tensor that enters: its shape and what is known of it."""

    shape: torch.Size
    info: TensorInfo


def parameter_operand(call: OperatorCall, parameter: Tensor, dim: int | None = None) -> Operand:
    """A parameter as it meets the output; a vector along dimension ``dim``."""
    info, shape = call.info(parameter), parameter.shape
    if dim is not None:
        shape = torch.Size([len(parameter) if d == dim else 1 for d in range(call.outputs[0].dim())])
    labels = tuple(one.map(lambda tensor: tensor.view(shape)) for one in info.labels)
    return Operand(shape, TensorInfo(labels, info.data))


def combine(
    call: OperatorCall, operands: Sequence[Operand], is_zero: IsZero, shape: torch.Size | None = None
) -> TensorInfo:
    """Labels of what the operator computes element by element, broadcast to the output's shape if to no other.

    Labels that vary along a common dimension lie on the same channels: they are tied, and an operand that has those
    extents without labels freezes them, since it cannot shrink with them.
    """
    shape = call.outputs[0].shape if shape is None else shape
    if (found := _alone(operands, is_zero, shape)) is not None:
        return found
    data = any(operand.info.data for operand in operands)
    if (vectors := _along_one(operands, len(shape))) is not None:
        dim, part = vectors
        return TensorInfo((Labels.along(_merge(call, operands, part, is_zero), shape, dim),), data)
    uniform = all(operand.info.uniform or not operand.shape.numel() > 1 for operand in operands)
    labels = [
        (index, one.expand(shape)) for index, operand in enumerate(operands) for one in operand.info.labels if one.dims
    ]
    combined = []
    for overlapping in _overlapping(labels):
        for part in _beside_fixed(call, operands, overlapping, len(shape)):
            dims = sorted({d for _, one in part for d in one.dims})
            regions = [(index, one.region(dims)) for index, one in part]
            merged = _merge(call, operands, regions, is_zero)
            combined.append(part[0][1] if merged is regions[0][1] else merged.expand(shape))
    return TensorInfo(tuple(combined), data, uniform and not combined)


def _alone(operands: Sequence[Operand], is_zero: IsZero, shape: torch.Size) -> TensorInfo | None:
    """What comes of one label beside numbers only, which most operators get; None: it is more than that."""
    labelled = [k for k, operand in enumerate(operands) if operand.info.labels]
    if len(labelled) != 1 or len(operands[labelled[0]].info.labels) != 1:
        return None
    operand = operands[labelled[0]]
    (one,) = operand.info.labels
    others = [other for other in operands if other is not operand]
    if one.live.dim() or not one.dims or any(other.shape.numel() > 1 for other in others):
        return None
    if any(each.info.zeros for each in operands):
        return None
    live = bool(one.live)
    if is_zero(tuple(k == labelled[0] and not live for k in range(len(operands)))) is not (not live):
        return None
    data = any(other.info.data for other in operands)
    return TensorInfo((one.expand(shape),), data)


Indexed = list[tuple[int, Labels]]  # with the number of their operand


def _along_one(operands: Sequence[Operand], rank: int) -> tuple[int, Indexed] | None:
    """The dimension and the labels (n,) along it, if all vary along this one, and nothing of fixed size does."""
    found: Indexed = []
    dims = set()
    for index, operand in enumerate(operands):
        for one in operand.info.labels:
            if len(one.dims) != 1 or one.live.dim():
                return None
            dims.add(one.dims[0] + rank - one.ids.dim())
            found.append((index, one.flat()))
    if len(dims) != 1:
        return None
    (dim,) = dims
    for operand in operands:
        own = dim - rank + len(operand.shape)
        if not operand.info.labels and not operand.info.uniform and own >= 0 and operand.shape[own] > 1:
            return None
    return dim, found


def _overlapping(labels: Indexed) -> list[Indexed]:
    """Grouped so that labels of different groups vary along different dimensions."""
    parts: list[Indexed] = []
    for index, one in labels:
        near = [part for part in parts if any(set(other.dims) & set(one.dims) for _, other in part)]
        apart = [part for part in parts if part not in near]
        parts = [*apart, [*itertools.chain(*reversed(near)), (index, one)]]
    return parts


def _beside_fixed(call: OperatorCall, operands: Sequence[Operand], part: Indexed, rank: int) -> list[Indexed]:
    """Labels that do not vary along dimensions in which an operand without labels has extents.

    Where they also vary along others (heads, whose width meets a rotary embedding), whole slices of those may go. A
    buffer that all heads share, and often all layers, counts as one of fixed size.
    """
    dims, present = {d for _, one in part for d in one.dims}, {index for index, _ in part}
    fixed = {
        d for index, operand in enumerate(operands) if index not in present and not operand.info.uniform
        for d, size in enumerate(operand.shape, rank - len(operand.shape)) if size > 1 and d in dims
    }  # fmt: skip
    heads = [one.dims for index, one in part if operands[index].info.data and len(one.dims) > 1]
    fixed |= {
        d for index, one in part if heads and not operands[index].info.data and bool(one.live.all())
        for d in one.dims if any(len(one.dims) < len(dims) for dims in heads)
    }  # fmt: skip
    if not fixed:
        return [part]
    held = [(index, one) for index, one in part if fixed.issuperset(one.dims)]
    if any(operands[index].info.data for index, _ in held):
        call.space.met.add(call.site.kind)
    call.freeze([one for _, one in held], f"meets a tensor of fixed size in {call.where}")
    free = [(index, call.fold(one, {*one.dims} - fixed)) for index, one in part if not fixed.issuperset(one.dims)]
    return _overlapping([(index, one) for index, one in free if one is not None])


def _merge(call: OperatorCall, operands: Sequence[Operand], part: Indexed, is_zero: IsZero) -> Labels:
    """What comes of labels of one shape, cut to where they vary; the first itself, if it comes out as it came in."""
    space, where = call.space, call.where
    present = [index for index, _ in part]
    labels = [one for _, one in part]
    ids = torch.stack([one.ids for one in labels])
    labelled: Any = ...
    if int(ids.min()) == NO_LABEL:  # where only some operands are labelled (padding, concatenation), nothing can go
        labelled = (ids != NO_LABEL).all(0)
        space.freeze(ids[:, ~labelled], f"meets channels of fixed number in {where}")
    empty = {index for index, operand in enumerate(operands) if operand.info.zeros}
    live = _live(call, labels, ids, lambda zeros: is_zero(_by_operand(zeros, present, empty, len(operands))))
    if len(part) == 1 and live is None and not labels[0].live.any():
        return labels[0]

    data = [k for k, index in enumerate(present) if operands[index].info.data]
    own = len(data) <= 1
    # Of a weight and its mask, the weight is the layer's: a buffer is live.
    lead = data[0] if data else next((k for k, one in enumerate(labels) if not one.live.any()), 0)
    if len(data) > 1 and sum(size > 1 for size in ids.shape[1:]) > 1:
        lead = max(data, key=lambda k: len(ids[k].unique()))  # of whole heads, every channel in them
    for k in range(len(ids)):
        if k != lead:
            space.tie(ids[lead][labelled], ids[k][labelled], own=own)
    out = ids[lead]
    if not own and any(not torch.equal(out, ids[k]) for k in data):
        # An addition's result is no layer's own: what normalises it belongs to the whole group.
        # What was one channel in several places (a head in every window) stays one.
        different, place = out.unique(return_inverse=True)
        out = space.fresh(len(different))[place]
        space.tie(out[labelled], ids[lead][labelled])
    return Labels(out if labelled is ... else torch.where(labelled, out, NO_LABEL), False if live is None else live)


def _by_operand(zeros: Sequence[bool], present: Sequence[int], empty: set[int], operands: int) -> tuple[bool, ...]:
    """Two labels of one operand on the same channels: zero if either is. empty: operands that are zero anyway."""
    zero = empty.union(itertools.compress(present, zeros))
    return tuple(k in zero for k in range(operands))


def _live(call: OperatorCall, labels: Sequence[Labels], ids: Tensor, is_zero: IsZero) -> Tensor | None:
    """Where the result may differ from zero once the channel is masked; None: nowhere."""
    if not any(one.live.dim() for one in labels):
        zero = is_zero(tuple(not bool(one.live) for one in labels))
        if isinstance(zero, str):
            call.space.freeze(ids, f"{zero} in {call.where}")
        return None if zero is True else _ALWAYS
    live = torch.stack(torch.broadcast_tensors(*(one.live for one in labels)))
    patterns = live[None] if live.dim() == 1 else live.flatten(1).unique(dim=1).t()
    if len(patterns) == 1:
        live = patterns[0]
    found = None
    for pattern in patterns:
        zero = is_zero(tuple(not flag for flag in pattern.tolist()))
        if zero is True:
            continue
        here = (live == pattern.view(-1, *[1] * (live.dim() - 1))).all(0)
        found = here if found is None else found | here
        if isinstance(zero, str):
            call.space.freeze(ids[:, here], f"{zero} in {call.where}")
    return found
