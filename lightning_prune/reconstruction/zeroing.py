"""Zeroing entries of many tensors in one operator, and telling whether anything has written to a tensor since."""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import compress

import torch
from torch import Tensor

# nan * 0 is nan and -1.0 * 0 is -0.0; the same bits read as an integer, times 0, are those of 0.0.
INTEGERS = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}

is_unwritten: Callable[[Tensor], bool] = getattr(torch._C, "_is_cow_tensor", lambda _: False)
"""Whether nothing wrote to a tensor since it was marked: not in place, nor through ``.data`` or numpy.

Torch flags the memory of a lazy clone and takes the flag away before it gives anybody an address to write to. The
clone is gone at once, so that nothing is ever copied. An address that somebody keeps from before is not seen.
"""

_LIBRARY = torch.library.Library("lightning_prune", "FRAGMENT")
_LIBRARY.define("zero_(Tensor(a!)[] tensors, Tensor[] masks, bool mark) -> ()")


def zero_(tensors: list[Tensor], masks: list[Tensor], mark: bool = False) -> None:
    """Multiply the bits of tensors by masks of 0 and 1 that broadcast; autograd sees no new version.

    mark: let `is_unwritten` tell from now on, where it can, whether anything wrote to a tensor.
    """
    with torch.no_grad():
        torch.ops.lightning_prune.zero_.default(tensors, masks, mark and can_mark())


def _zero_(tensors: list[Tensor], masks: list[Tensor], mark: bool) -> None:
    with torch._C._AutoDispatchBelowADInplaceOrView():
        _multiply_([tensor.view(mask.dtype) for tensor, mask in zip(tensors, masks, strict=True)], masks)
    if mark:
        for tensor in tensors:
            _mark(tensor)


def _multiply_(bits: list[Tensor], masks: list[Tensor]) -> None:
    vectors = [bit.is_cuda and bit.dim() == 1 for bit in bits]
    if any(vectors):  # they are of their masks' shapes: one CUDA kernel for all
        torch._foreach_mul_(list(compress(bits, vectors)), list(compress(masks, vectors)))
        others = [not vector for vector in vectors]
        bits, masks = list(compress(bits, others)), list(compress(masks, others))
    if bits:
        torch._foreach_mul_(bits, masks)


def _mark(tensor: Tensor) -> None:
    # Memory that an array of numpy's shares cannot be resized, and is written without a trace.
    if tensor.untyped_storage().resizable():
        try:
            torch._lazy_clone(tensor)
        except RuntimeError:  # memory that several processes share
            return


_LIBRARY.impl("zero_", _zero_, "CompositeExplicitAutograd")


@functools.cache
def can_mark() -> bool:
    """Whether this version of torch can tell."""
    try:
        tensor = torch.zeros(2)
        _mark(tensor)
        marked = is_unwritten(tensor) and tensor.sum() == 0 and is_unwritten(tensor)
        tensor.data[0] = 1
        return bool(marked) and not is_unwritten(tensor) and tensor.tolist() == [1, 0]
    except AttributeError:
        return False


def can_zero(tensor: Tensor | None, kind: type[Tensor]) -> bool:
    """Whether `zero_` takes this tensor; subclasses and wrappers of torch's transforms are not of the kind."""
    return (
        type(tensor) is kind
        and tensor.dtype in INTEGERS
        and tensor.layout is torch.strided
        and tensor.device.type in ("cpu", "cuda")
    )
