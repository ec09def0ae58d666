"""Writes through one view of a storage, and what the others know after them."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from lightning_prune.graph.labels import Labels, TensorInfo, Zeros
from lightning_prune.graph.operator_call import OperatorCall


def meet_aliases(call: OperatorCall, before: TensorInfo, after: TensorInfo) -> None:
    """A write through one view changes the others: they get the labels, or those cannot be followed."""
    if before.zeros and not after.zeros:
        for alias in call.recorder.aliases(call.outputs[0]):
            call.recorder.set_info(alias, replace(call.info(alias), zeros=None))
    if len(before.labels) == len(after.labels) and all(map(Labels.equal, before.labels, after.labels)):
        _check_pattern(call, after)
        if after.data and not before.data:  # a new tensor is filled in by and by
            for alias in call.recorder.aliases(call.outputs[0]):
                call.recorder.set_info(alias, replace(call.info(alias), data=True, uniform=False))
        return
    for alias in call.recorder.aliases(call.outputs[0]):
        info = call.info(alias)
        found = [_placed(labels, alias, call.outputs[0]) for labels in after.labels]
        placed = [labels for labels in found if labels is not None]
        if len(placed) == len(found) and (info.labels or info.uniform):
            call.recorder.set_info(alias, _written(call, info, placed, before.zeros))
        else:
            call.freeze((*info.labels, *after.labels), f"is written through a view by {call.where}")


def _check_pattern(call: OperatorCall, after: TensorInfo) -> None:
    """A new tensor written at single places (an identity kernel) no longer has whatever extents are wanted."""
    view = call.outputs[0]
    if after.labels or view.numel() * view.itemsize == view.untyped_storage().nbytes():
        return
    for alias in call.recorder.aliases(view):
        info = call.info(alias)
        if info.uniform and len(_dims(alias) - _dims(view)) > 1:
            call.recorder.set_info(alias, replace(info, uniform=False))


def _written(call: OperatorCall, info: TensorInfo, came: list[Labels], zeros: Zeros | None) -> TensorInfo:
    """Labels of a tensor, part of whose positions were written: what was there and what came are tied."""
    written = []
    for new in came:
        core = new.region()
        there = [labels.region() for labels in info.labels if labels.dims == new.dims]
        for old in there:
            call.space.tie(old.ids, core.ids)
            core = Labels(core.ids, core.live | old.live)
        if zeros is not None and len(new.dims) == 1 and not there:
            call.counted_by_code(new.flat().ids, zeros.site)
        written.append(core.expand(new.ids.shape))
    kept = [old for old in info.labels if old.dims not in {new.dims for new in written}]
    return TensorInfo((*written, *kept), data=True)


def _dims(tensor: Tensor) -> set[tuple[int, int]]:
    """(size, stride) of the dimensions that it has."""
    return {(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1}


def _placed(labels: Labels, alias: Tensor, view: Tensor) -> Labels | None:
    """A view's labels on another view of the same storage; None unless it has all these channels."""
    if alias.dim() == view.dim():
        same = all(alias.shape[d] == view.shape[d] and alias.stride(d) == view.stride(d) for d in labels.dims)
        return labels.region().expand(alias.shape) if same else None
    if len(labels.dims) > 1:
        return None
    form = view.shape[labels.dims[0]], view.stride(labels.dims[0])
    found = [d for d in range(alias.dim()) if (alias.shape[d], alias.stride(d)) == form]
    return Labels.along(labels.flat(), alias.shape, found[0]) if len(found) == 1 else None
