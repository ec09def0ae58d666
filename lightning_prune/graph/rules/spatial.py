"""Pooling, resizing and sampling: every channel by itself, positions change."""

from __future__ import annotations

import re

from torch import Tensor

from lightning_prune.graph.contraction import fold
from lightning_prune.graph.labels import Info, region, signature, spread
from lightning_prune.graph.operator_call import Context, tensors_out


def pooling(c: Context) -> list[Info]:
    """Pooling, resizing, reflection padding: zeros stay zero."""
    tensor = c.args[0]
    found = re.search(r"([123])d", c.name)
    positions = int(found.group(1)) if found else 2
    channels = tuple(range(tensor.dim() - positions))
    outputs = tensors_out(c.output)
    layers = _by_channel(c, tensor, channels, f"varies over the positions that {c.where} pools")
    shape = outputs[0].shape
    layers = [region(layer, signature(layer)).expand(shape) for layer in layers]
    info = c.info(tensor)
    return [Info(tuple(layers), data=info.data), *[Info(data=info.data)] * (len(outputs) - 1)]


def sampling(c: Context) -> list[Info]:
    """``roi_align``, ``grid_sample``: the channels of the first tensor; what says where is frozen."""
    tensor = c.args[0]
    for other in c.args[1:]:
        for layer in c.info(other).layers if isinstance(other, Tensor) else ():
            c.space.freeze(layer, f"says where {c.where} samples")
    layers = _by_channel(c, tensor, (1,), f"varies over the positions that {c.where} samples")
    outputs = tensors_out(c.output)
    layers = [spread(region(layer, (1,)).flatten(), outputs[0].shape, 1) for layer in layers]
    return [Info(tuple(layers), data=True), *[Info(data=True)] * (len(outputs) - 1)]


def _by_channel(c: Context, tensor: Tensor, channels: tuple[int, ...], reason: str) -> list[Tensor]:
    """Layers along the channels only; what varies over positions too goes together."""
    layers = []
    for layer in c.info(tensor).layers:
        if not set(signature(layer)) & set(channels):
            c.space.freeze(layer, reason)
        elif (folded := fold(c.space, layer, channels, c.where)) is not None:
            layers.append(folded)
    return layers
