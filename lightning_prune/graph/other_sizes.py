"""Inputs of another batch and image size than those that were given, made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_prune.graph.entry_points import EntryPoint, head
from lightning_prune.graph.running import map_tensors, tensors_in

SMALL = 64  # pixels
Change = Callable[[Tensor], Tensor]


def other_sizes(entry: EntryPoint) -> Iterator[EntryPoint]:
    """The same call with one more sample and larger images; else only one of the two. What a model takes, it shows.

    Samples and pixels are not those of the example: images are resized, what is new is made of what was there.
    """
    tensors = tensors_in(entry.inputs)
    sides = _sides(tensors)
    grown = [_resized(sides)] if sides else []
    leading = {len(tensor) for tensor in tensors if tensor.dim()}
    more = [_one_more(leading.pop())] if len(leading) == 1 else []
    for changes in ([*more, *grown], grown, more):
        if changes:
            yield _varied(entry, changes)


def odd_sizes(entry: EntryPoint) -> Iterator[EntryPoint]:
    """One sample whose sides are odd, so that strides and poolings leave a rest; else only one of the two."""
    one = head(entry, 1)
    sides = _sides(tensors_in(entry.inputs))
    after = tuple(side + step * (side % 2 == 0 and side > 4) for side, step in zip(sides, (-1, 1), strict=False))
    changes = [_resized_to(sides, after)] if sides != after else []
    for start, change in ((one, changes), (entry, changes), (one, [])):
        if change or start is not entry:
            yield replace(_varied(start, change), varied=entry)


def _sides(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Height and width, or length, of the first images; none without images."""
    images = (tensor for tensor in tensors if tensor.is_floating_point() and tensor.dim() >= 3)
    return next((tuple(image.shape[max(image.dim() - 2, 2) :]) for image in images), ())


def _varied(entry: EntryPoint, changes: list[Change]) -> EntryPoint:
    def changed(tensor: Tensor) -> Tensor:
        for change in changes:
            tensor = change(tensor)
        return tensor

    inputs: Any = map_tensors(changed, entry.inputs)
    return replace(entry, name=f"{entry.name} at another size", inputs=inputs, varied=entry)


def takes_size(other: EntryPoint, before: Sequence[int], after: Sequence[int]) -> bool:
    """Whether a model that ran on another size also means it, by the leading sizes of its outputs then and now.

    ``view(-1, 400)`` runs on every image size whose elements can be divided so, and makes other rows than samples.
    """
    assert other.varied is not None
    rows = [new for old, new in zip(before, after, strict=False) if old == other.varied.samples]
    return len(before) == len(after) and all(row == other.samples for row in rows)


def _one_more(samples: int) -> Change:
    def change(tensor: Tensor) -> Tensor:
        if not tensor.dim() or len(tensor) != samples:
            return tensor
        first = tensor[:1]
        if tensor.is_floating_point():
            first = first.flip(-1) * 0.9 + tensor[-1:].roll(1, -1) * 0.3
        return torch.cat([tensor, first])

    return change


def _resized(before: tuple[int, ...]) -> Change:
    """Other extents of every tensor that ends in these, sides no longer alike.

    Small images get half as large again; large ones, which take long, only so much that windows and poolings tell.
    Multiples of 32 stay multiples of 32, since strides of most networks divide it.
    """
    step = next(step for step in (32, 16, 8, 4, 2, 1) if all(size % step == 0 for size in before))
    after = [
        max(size + step, size * (2 + k) // 2 // step * step)
        if max(before) <= SMALL
        else size + k * max(step, size // 8 // step * step)
        for k, size in enumerate(reversed(before), 1)
    ][::-1]

    return _resized_to(before, after)


def _resized_to(before: tuple[int, ...], after: Sequence[int]) -> Change:
    def change(tensor: Tensor) -> Tensor:
        n = len(before)
        if tensor.dim() < n + 1 or tuple(tensor.shape[-n:]) != before:
            return tensor
        flat = tensor.reshape(1, -1, *before)
        mode = {1: "linear", 2: "bilinear"}[n] if tensor.is_floating_point() else "nearest"
        resized = F.interpolate(flat.double(), after, mode=mode).to(tensor.dtype)
        return resized.view(*tensor.shape[:-n], *after)

    return change
