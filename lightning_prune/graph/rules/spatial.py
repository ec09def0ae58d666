"""Pooling, resizing, sampling and patches: every channel by itself, positions change."""

from __future__ import annotations

from lightning_prune.graph.labels import Labels, TensorInfo
from lightning_prune.graph.operator_call import OperatorCall


def pooling(call: OperatorCall) -> TensorInfo:
    """Pooling, resizing, reflection padding: zeros stay zero."""
    positions = next((n for n in (1, 2, 3) if f"{n}d" in call.name), 2)
    channels = tuple(range(call.args[0].dim() - positions))
    found = call.by_channel(f"varies over the positions that {call.where} pools", channels)
    shape = call.outputs[0].shape
    return TensorInfo(tuple(one.region().expand(shape) for one in found), call.info(call.args[0]).data)


def sampling(call: OperatorCall) -> TensorInfo:
    """``roi_align``, ``grid_sample``: the channels of the first tensor; what says where is frozen."""
    for other in call.args[1:]:
        call.freeze(call.info(other).labels, f"says where {call.where} samples")
    found = call.by_channel(f"varies over the positions that {call.where} samples")
    return TensorInfo(tuple(Labels.along(one.flat(), call.outputs[0].shape, 1) for one in found), data=True)


def patches(call: OperatorCall) -> TensorInfo:
    """``im2col``: every channel becomes its kernel positions, which follow each other."""
    area = call.output.shape[1] // call.args[0].shape[1]
    found = [
        folded.flat().map(lambda tensor: tensor.repeat_interleave(area))
        for folded in call.by_channel(f"varies over the positions that {call.where} collects")
    ]
    return _along_channels(call, found)


def unpatches(call: OperatorCall) -> TensorInfo:
    """``col2im``: the reverse; a channel's kernel positions go together."""
    found = []
    for flat in call.by_channel(f"varies over the positions that {call.where} puts together"):
        grid = flat.flat().map(lambda tensor: tensor.reshape(call.output.shape[1], -1))
        if (folded := call.fold(grid, (0,))) is not None:
            found.append(folded.flat())
    return _along_channels(call, found)


def _along_channels(call: OperatorCall, vectors: list[Labels]) -> TensorInfo:
    labels = tuple(Labels.along(vector, call.output.shape, 1) for vector in vectors)
    return TensorInfo(labels, call.info(call.args[0]).data)
