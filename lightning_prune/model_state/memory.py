"""Where tensors lie: in which order, in which storage, and how they come to lie elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def memory_order(tensor: Tensor) -> list[int]:
    """Dimensions from outermost to innermost; sizes of 1, whose strides say nothing, where torch's formats have them.

    (N, 1, H, W) is channels last if its second stride is 1, contiguous if it is H * W.
    """
    sizes, strides = tensor.shape, tensor.stride()
    dims = range(len(sizes))
    if len(sizes) < 2 or any(strides[dim] == 0 and sizes[dim] > 1 for dim in dims):
        return list(dims)
    return sorted(dims, key=lambda dim: (-strides[dim], sizes[dim] == 1, dim))


def dense_copy(tensor: Tensor, like: Tensor) -> Tensor:
    """A dense copy whose dimensions lie in memory in the order of those of ``like``."""
    order = memory_order(like)
    return upright(tensor.permute(order).clone(memory_format=torch.contiguous_format), order)


def upright(lying: Tensor, order: list[int]) -> Tensor:
    """The dimensions of a tensor that was permuted to this order, as they were."""
    return lying.permute(sorted(range(len(order)), key=order.__getitem__))


def set_data_(tensor: Tensor, data: Tensor) -> None:
    """Give a tensor without a gradient other data, of another shape perhaps.

    An autograd graph that somebody still holds keeps the parameter's gradient accumulator, which knows the old shape,
    and a new graph would use it again. Torch makes a new one only when the type changes, so it does on the way. Within
    `torch.autocast`, a copy of the old data in half precision would be used again, too.
    """
    torch.clear_autocast_cache()
    if data.shape != tensor.shape:
        other = torch.float16 if data.dtype != torch.float16 else torch.float32
        tensor.data = torch.empty(0, dtype=other, device=data.device)
    tensor.data = data


def storage_of(tensor: Tensor) -> int:
    """Which memory it lies in."""
    return tensor.untyped_storage()._cdata


class NewMemory:
    """Gives tensors other data; those that are the same elements of the same memory, weights tied that way, stay so."""

    def __init__(self) -> None:
        # With the old data, whose address no other tensor gets then.
        self._made: dict[Any, tuple[Tensor, Tensor, Tensor]] = {}

    def change_(self, tensor: Tensor, change: Callable[[Tensor], Tensor], dim: int, entries: Tensor) -> None:
        """Give it what ``change`` makes of its data; ``dim`` and ``entries`` say which change that is."""
        data = tensor.data
        place = storage_of(data), data.storage_offset(), data.shape, data.stride(), dim
        made = self._made.get(place)
        if made is None or not torch.equal(made[1], entries):
            made = self._made[place] = data, entries, change(data)
        set_data_(tensor, made[2])

    def leave_(self, tensors: Iterable[Tensor]) -> None:
        """Take what still lies in a storage that others have left (one vector of all parameters) out of it."""
        left = {storage_of(old) for old, *_ in self._made.values()}
        for tensor in tensors:
            if storage_of(tensor) in left:
                self.change_(tensor, lambda data: dense_copy(data, data), -1, torch.tensor([]))
