"""Pooling, resizing and sampling: every channel by itself, positions change."""

from __future__ import annotations

from torch import Tensor

from lightning_prune.graph.labels import Labels, TensorInfo
from lightning_prune.graph.operator_call import OperatorCall


def pooling(call: OperatorCall) -> TensorInfo:
    """Pooling, resizing, reflection padding: zeros stay zero."""
    positions = next((n for n in (1, 2, 3) if f"{n}d" in call.name), 2)
    channels = tuple(range(call.args[0].dim() - positions))
    labels = _by_channel(call, channels, f"varies over the positions that {call.where} pools")
    shape = call.outputs[0].shape
    return TensorInfo(tuple(one.region().expand(shape) for one in labels), call.info(call.args[0]).data)


def sampling(call: OperatorCall) -> TensorInfo:
    """``roi_align``, ``grid_sample``: the channels of the first tensor; what says where is frozen."""
    for other in call.args[1:]:
        for labels in call.info(other).labels if isinstance(other, Tensor) else ():
            call.freeze(labels, f"says where {call.where} samples")
    found = _by_channel(call, (1,), f"varies over the positions that {call.where} samples")
    return TensorInfo(tuple(Labels.along(one.flat(), call.outputs[0].shape, 1) for one in found), data=True)


def _by_channel(call: OperatorCall, channels: tuple[int, ...], reason: str) -> list[Labels]:
    """Labels along the channels only; what varies over positions too goes together."""
    found = []
    for labels in call.info(call.args[0]).labels:
        if not set(labels.dims) & set(channels):
            call.freeze(labels, reason)
        elif (folded := call.fold(labels, channels)) is not None:
            found.append(folded)
    return found
