"""Writes through one view of a storage, and what the others know after them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_prune.graph.labels import NO_LABEL, Labels, TensorInfo, collapse
from lightning_prune.graph.operator_call import OperatorCall


def meet_aliases(call: OperatorCall, before: TensorInfo, after: TensorInfo) -> None:
    """A write through one view changes the others: they get the labels, or those cannot be followed."""
    recorder, view = call.recorder, call.outputs[0]
    aliases = recorder.aliases(view)
    for tensor in (view, *aliases) if recorder.repeats else ():
        recorder.repeats.pop(tensor, None)
    recorder.cleared |= after.zeros is not None and before.zeros is None
    if len(before.labels) == len(after.labels) and all(map(Labels.equal, before.labels, after.labels)):
        _check_pattern(call, aliases, after)
        if after.data and not before.data:  # a new tensor is filled in by and by
            for alias in aliases:
                recorder.set_info(alias, replace(call.info(alias), data=True, uniform=False))
        if after.zeros is None and not (after.labels and _is_whole(view)):
            for alias in aliases:
                info = call.info(alias)
                if len(info.labels) > len(after.labels):
                    recorder.set_info(alias, replace(info, labels=tuple(one.constant() for one in info.labels)))
            recorder.note_written([view, *aliases])
    else:
        _spread(call, aliases, before, after)
        if after.zeros is None:
            recorder.note_written([view, *aliases])
    if after.zeros is None and (before.zeros or recorder.cleared):
        for alias in aliases:
            if call.info(alias).zeros:
                recorder.set_info(alias, replace(call.info(alias), zeros=None))


def _spread(call: OperatorCall, aliases: Sequence[Tensor], before: TensorInfo, after: TensorInfo) -> None:
    """Give the labels of what was written to all that has a part of it."""
    view = call.outputs[0]
    whole = [tensor for tensor in (view, *aliases) if tensor.dtype == view.dtype and _is_whole(tensor)]
    base = max(whole, key=Tensor.dim, default=None)
    for alias in aliases:
        info = call.info(alias)
        places = None if base is None else _Places.of(base, view, alias)
        if places is not None and places.apart:
            continue
        found = [_placed(labels, alias, view, places) for labels in after.labels]
        placed = [labels for labels in found if labels is not None]
        if len(placed) == len(found) and (info.labels or info.uniform):
            call.recorder.set_info(alias, _written(call, alias, placed, before, after))
        else:
            call.freeze((*info.labels, *after.labels), f"is written through a view by {call.where}")


def _check_pattern(call: OperatorCall, aliases: Sequence[Tensor], after: TensorInfo) -> None:
    """A new tensor written at single places (an identity kernel) no longer has whatever extents are wanted."""
    view = call.outputs[0]
    if after.labels or _is_whole(view):
        return
    for alias in aliases:
        info = call.info(alias)
        if info.uniform and len(_dims(alias) - _dims(view)) > 1:
            call.recorder.set_info(alias, replace(info, uniform=False))


def _is_whole(view: Tensor) -> bool:
    """Whether it has all elements of its storage."""
    return view.numel() * view.itemsize == view.untyped_storage().nbytes()


@dataclass(frozen=True)
class _Written:
    """What was written, on another view: labels of its whole shape, -1 outside of ``start .. end`` along ``dim``."""

    labels: Labels
    dim: int | None = None  # None: all of these channels were written
    start: int = 0
    end: int = 0


def _written(
    call: OperatorCall, alias: Tensor, came: list[_Written], before: TensorInfo, after: TensorInfo
) -> TensorInfo:
    """Labels of a tensor, part of whose positions were written: what was there and what came are tied.

    Where something without these labels lies (a number that was written), masking leaves no zero.
    """
    info = call.info(alias)
    written = []
    for one in came:
        new = one.labels
        core = new.region()
        there = [labels.region() for labels in info.labels if labels.dims == new.dims]
        filled = not there and (bool(info.labels) or call.recorder.was_written(alias))
        if one.dim is not None:
            core = _beside(call, alias, one, there, filled=filled)
        elif filled:
            core = core.constant()
        else:
            for old in there:
                call.space.tie(old.ids, core.ids)
                core = Labels(core.ids, core.live | old.live)
        if before.zeros is not None and len(new.dims) == 1 and not there:
            call.counted_by_code(core.flat().ids, before.zeros.site)
        written.append(core.expand(new.ids.shape))
    dims = {one.labels.dims for one in came}
    kept = [old if after.zeros else old.constant() for old in info.labels if old.dims not in dims]
    return TensorInfo((*written, *kept), data=True)


def _beside(call: OperatorCall, alias: Tensor, one: _Written, there: list[Labels], *, filled: bool) -> Labels:
    """Some channels were written: the others stay what they were, in a new tensor without labels they get such."""
    assert one.dim is not None
    new, zeros = one.labels.flat(), call.info(alias).zeros
    like = [labels for labels in zeros.like if labels.dims == (one.dim,)] if zeros else []
    inside = torch.zeros(len(new.ids), dtype=torch.bool)
    inside[one.start : one.end] = True
    if known := (there or like)[:1]:
        old = known[0].flat()
        both = (old.ids != NO_LABEL) & (new.ids != NO_LABEL)
        apart = torch.cat([old.ids[inside & ~both], new.ids[inside & ~both]])
        call.space.tie(old.ids[inside & both], new.ids[inside & both])
        call.space.freeze(apart, f"is written through a view by {call.where}")
    else:
        old = Labels(call.space.fresh(len(inside)))
    live = old.live | filled | (zeros is None) if not there else old.live
    live = collapse(torch.where(inside, live | new.live, live))
    vector = Labels(torch.where(inside, new.ids, old.ids), live)
    return Labels.along(vector, alias.shape, one.dim).region((one.dim,))


def _dims(tensor: Tensor) -> set[tuple[int, int]]:
    """(size, stride) of the dimensions that it has."""
    return {(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1}


# By dimension of a dense tensor: start and end of a slice of it, and which of the slice's dimensions it is.
_Place = dict[int, tuple[int, int, "int | None"]]


@dataclass(frozen=True)
class _Places:
    """Where two slices of one dense tensor lie in it."""

    view: _Place
    alias: _Place

    @classmethod
    def of(cls, base: Tensor, view: Tensor, alias: Tensor) -> _Places | None:
        """None: they are no plain slices of it."""
        first, second = _place(base, view), _place(base, alias)
        return None if first is None or second is None else cls(first, second)

    @property
    def apart(self) -> bool:
        """Whether they have no element in common."""
        return any(min(end, self.alias[d][1]) <= max(at, self.alias[d][0]) for d, (at, end, _) in self.view.items())


def _place(base: Tensor, tensor: Tensor) -> _Place | None:
    """Where a slice of a dense tensor lies in it; None: it is no such slice."""
    real = sorted((d for d in range(base.dim()) if base.shape[d] > 1), key=base.stride, reverse=True)
    own = {tensor.stride(d): d for d in range(tensor.dim()) if tensor.shape[d] > 1}
    if tensor.dtype != base.dtype or len(own) < sum(size > 1 for size in tensor.shape):
        return None
    found: _Place = {}
    left, area = tensor.storage_offset(), base.numel()
    for d in real:
        stride = base.stride(d)
        if stride * base.shape[d] != area:  # strides of a dense tensor count up to the whole
            return None
        start, left, area = int(left // stride), left % stride, stride
        dim = own.pop(stride, None)
        end = start + (1 if dim is None else int(tensor.shape[dim]))
        if end > base.shape[d]:
            return None
        found[d] = start, end, dim
    return None if left or own else found


def _placed(labels: Labels, alias: Tensor, view: Tensor, places: _Places | None) -> _Written | None:
    """A view's labels on another view of the same storage; None unless these channels can be told there."""
    at = [] if places is None else [d for d, (_, _, own) in places.view.items() if own in labels.dims]
    if places is None or (len(at) > 1 and all(places.view[d][:2] == places.alias[d][:2] for d in at)):
        same = _same_extents(labels, alias, view)
        return None if same is None else _Written(same)
    if len(at) != 1 or len(labels.dims) != 1:
        return None
    (first, last, _), (begin, end, dim) = places.view[at[0]], places.alias[at[0]]
    if dim is None:
        return None
    start, stop = max(first, begin), min(last, end)
    flat = labels.flat().map(lambda tensor: tensor[start - first : stop - first])
    if (start, stop) == (begin, end):
        return _Written(Labels.along(flat, alias.shape, dim))
    around = (start - begin, end - stop)
    ids = torch.constant_pad_nd(flat.ids, around, NO_LABEL)
    live = torch.constant_pad_nd(flat.live.expand(flat.ids.shape), around, False)
    return _Written(Labels.along(Labels(ids, live), alias.shape, dim), dim, start - begin, stop - begin)


def _same_extents(labels: Labels, alias: Tensor, view: Tensor) -> Labels | None:
    """A view's labels on another view that has all these channels."""
    if alias.dim() == view.dim():
        same = all(alias.shape[d] == view.shape[d] and alias.stride(d) == view.stride(d) for d in labels.dims)
        return labels.region().expand(alias.shape) if same else None
    if len(labels.dims) > 1:
        return None
    form = view.shape[labels.dims[0]], view.stride(labels.dims[0])
    found = [d for d in range(alias.dim()) if (alias.shape[d], alias.stride(d)) == form]
    return Labels.along(labels.flat(), alias.shape, found[0]) if len(found) == 1 else None
