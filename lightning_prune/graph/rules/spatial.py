"""Pooling, resizing, sampling and patches: every channel by itself, positions change."""

from __future__ import annotations

from dataclasses import replace

import torch

from lightning_prune.graph.elementwise import Operand, combine
from lightning_prune.graph.labels import Labels, TensorInfo
from lightning_prune.graph.operator_call import OperatorCall


def pooling(call: OperatorCall) -> TensorInfo | list[TensorInfo]:
    """Pooling, resizing, reflection padding: zeros stay zero. Where the largest lay has a channel, too."""
    positions = next((n for n in (1, 2, 3) if f"{n}d" in call.name), 2)
    channels = tuple(range(call.args[0].dim() - positions))
    found = call.by_channel(f"varies over the positions that {call.where} pools", channels)
    shape = call.outputs[0].shape
    pooled = TensorInfo(tuple(one.region().expand(shape) for one in found), call.info(call.args[0]).data)
    return [pooled, pooled.with_labels(map(Labels.constant, pooled.labels))] if len(call.outputs) > 1 else pooled


def unpooling(call: OperatorCall) -> TensorInfo:
    """``max_unpool``: every channel's values go back to where its largest lay, zeros around them."""
    channels = tuple(range(call.output.dim() - int(call.name[-2])))
    shape = torch.Size(size if d in channels else 1 for d, size in enumerate(call.output.shape))
    operands = []
    for tensor in call.args[:2]:
        folded = [(one, call.fold(one, channels)) for one in call.info(tensor).labels]
        call.freeze((one for one, kept in folded if kept is None), f"varies over the positions of {call.where}")
        kept = tuple(one.region(channels).expand(shape) for _, one in folded if one is not None)
        operands.append(Operand(shape, replace(call.info(tensor), labels=kept)))
    found = combine(call, operands, lambda zeros: zeros[0], shape)
    return replace(found, labels=tuple(one.expand(call.output.shape) for one in found.labels), data=True)


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
