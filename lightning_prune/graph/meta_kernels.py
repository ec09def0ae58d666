"""Shapes of the commonest operators on the meta device, where torch decomposes many of them into dozens of others.

A kernel says what its operator returns, or None where torch itself has to say it: of tensors that are not dense and in
order, of several types, or of arguments that torch would refuse with a message of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import ceil, floor
from typing import Any

import torch
from torch import Tensor

from lightning_prune.graph.rules import rule_for
from lightning_prune.graph.rules.pointwise import elementwise

Kernel = Callable[..., Any]
COMPARISONS = frozenset("eq ne lt le gt ge isnan isinf isfinite".split())
MASKS = frozenset("where masked_fill".split())
OTHER_TYPES = frozenset(  # of the element-wise ones, those whose results torch has to say
    "logical_and logical_or logical_xor logical_not bitwise_and bitwise_or bitwise_xor bitwise_not "
    "log_sigmoid_forward".split()
)


def answer(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operator returns; by a kernel of this file where there is one."""
    if not kwargs and (kernel := _kernel_for(func)) is not None and (found := kernel(*args)) is not None:
        return found
    return func(*args, **kwargs)


@cache
def _kernel_for(func: Any) -> Kernel | None:
    """What answers for an operator in place of torch; None: torch does."""
    namespace, name = func.overloadpacket._qualified_op_name.split("::")
    if namespace != "aten":
        return None
    plain = name.removesuffix("_")
    if rule_for(func) is not elementwise or plain in OTHER_TYPES:
        return _KERNELS.get(name)
    if func._schema.is_mutable:
        return None if plain in COMPARISONS else _in_place
    return _compared if plain in COMPARISONS else _masked if plain in MASKS else _elementwise


def _plain(*tensors: Tensor | None) -> bool:
    """Whether all are dense meta tensors in order, of the first one's floating type."""
    first = tensors[0]
    assert first is not None
    return first.is_floating_point() and all(
        t is None or (t.is_meta and t.is_contiguous() and t.dtype == first.dtype) for t in tensors
    )


def _new(shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device="meta")


def _elementwise(*args: Any) -> Tensor | None:
    tensors = [value for value in args if isinstance(value, Tensor)]
    first = tensors[0]
    kind = first.dtype
    if first is args[0] and all(t.is_meta and t.shape == first.shape and t.dtype == kind for t in tensors):
        return first.clone() if kind.is_floating_point else None
    return _broadcast(tensors, kind) if _plain(*tensors) else None


def _compared(*args: Any) -> Tensor | None:
    tensors = [value for value in args if isinstance(value, Tensor)]
    return _broadcast(tensors, torch.bool) if _plain(*tensors) else None


def _masked(*args: Any) -> Tensor | None:
    """``where``, ``masked_fill``: a mask, and numbers of one type."""
    tensors = [value for value in args if isinstance(value, Tensor)]
    numbers = [t for t in tensors if t.dtype != torch.bool]
    masks = [t for t in tensors if t.dtype == torch.bool]
    if not numbers or not _plain(*numbers) or not all(mask.is_meta and mask.is_contiguous() for mask in masks):
        return None
    return _broadcast(tensors, numbers[0].dtype)


def _broadcast(tensors: Sequence[Tensor], kind: torch.dtype) -> Tensor | None:
    rank = max(t.dim() for t in tensors)
    shapes = [(1,) * (rank - t.dim()) + t.shape for t in tensors]
    sizes = [{*column} - {1} for column in zip(*shapes, strict=True)]
    if any(len(size) > 1 for size in sizes):
        return None
    return torch.empty([max(size, default=1) for size in sizes], dtype=kind, device="meta")


def _in_place(*args: Any) -> Tensor | None:
    first = args[0]
    if not isinstance(first, Tensor):
        return None
    found = _masked(*args) if len(args) > 1 and isinstance(args[1], Tensor) else _elementwise(*args)
    return first if found is not None and found.shape == first.shape else None


def _batch_norm(
    x: Tensor, weight: Any, bias: Any, mean: Any = None, var: Any = None, *_: Any
) -> tuple[Tensor, Tensor, Tensor] | None:
    if not x.is_meta:
        return None
    vectors = [vector for vector in (weight, bias, mean, var) if isinstance(vector, Tensor)]
    if any(len(vector) != x.shape[1] for vector in vectors):
        sizes = [len(vector) for vector in vectors]
        raise RuntimeError(f"batch norm over {x.shape[1]} channels has parameters for {sizes}")
    return x.clone(), _new((0,), x), _new((0,), x)


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Tensor | None:
    rank = x.dim() - 2
    if not _plain(x, weight, bias) or weight.dim() != x.dim() or rank < 1:
        return None
    inputs, outputs = (weight.shape[0], weight.shape[1] * groups)[:: 1 if transposed else -1]
    if x.shape[1] != inputs or weight.shape[0] % groups or (bias is not None and len(bias) != outputs):
        raise RuntimeError(
            f"convolution: an input of {list(x.shape)} meets a weight of {list(weight.shape)} in {groups} groups"
        )
    s, p, d, o = (list(one) * rank if len(one) == 1 else one for one in (stride, padding, dilation, output_padding))
    kernel = [d[k] * (weight.shape[2 + k] - 1) + 1 for k in range(rank)]
    if transposed:
        sizes = [(x.shape[2 + k] - 1) * s[k] - 2 * p[k] + kernel[k] + o[k] for k in range(rank)]
    else:
        sizes = [(x.shape[2 + k] + 2 * p[k] - kernel[k]) // s[k] + 1 for k in range(rank)]
    return _new((x.shape[0], outputs, *sizes), x) if min(sizes) > 0 else None


def _product(left: Tensor, right: Tensor) -> Tensor | None:
    alike = left.is_meta and right.is_meta and left.dtype == right.dtype and left.shape[:-2] == right.shape[:-2]
    if not alike or left.shape[-1] != right.shape[-2]:
        return None
    return _new((*left.shape[:-1], right.shape[-1]), left)


def _product_and_sum(added: Tensor, left: Tensor, right: Tensor) -> Tensor | None:
    found = _product(left, right)
    if found is None or added.dtype != left.dtype or added.shape not in (found.shape, found.shape[-1:]):
        return None
    return found


def _reduced(x: Tensor, dim: int | list[int] | None = None, keepdim: bool = False) -> Tensor | None:
    if not _plain(x) or not x.dim() or dim is None or dim == []:
        return None
    dims = {d % x.dim() for d in ([dim] if isinstance(dim, int) else dim)}
    return _new([1 if d in dims else n for d, n in enumerate(x.shape) if keepdim or d not in dims], x)


def _vector_norm(x: Tensor, _: float = 2, dim: list[int] | None = None, keepdim: bool = False) -> Tensor | None:
    return _reduced(x, dim, keepdim)


def _layer_norm(
    x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, _: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    affine = [v for v in (weight, bias) if v is not None]
    if not x.is_meta or not _plain(*affine, _new((0,), x)) or any(list(v.shape) != list(shape) for v in affine):
        return None
    if list(x.shape[x.dim() - len(shape) :]) != list(shape):
        return None
    statistic = (*x.shape[: x.dim() - len(shape)], *[1] * len(shape))
    return _new(x.shape, x), _new(statistic, x), _new(statistic, x)


def _group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, channels: int, _: int, groups: int, __: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    if not _plain(x, weight, bias) or any(v is not None and len(v) != channels for v in (weight, bias)):
        return None
    if channels % groups or x.shape[1] != channels:
        return None
    return x.clone(), _new((n, groups), x), _new((n, groups), x)


def _max_pool(
    x: Tensor,
    kernel: list[int],
    stride: list[int] = [],  # noqa: B006  # the operator's own default
    padding: list[int] = [0],  # noqa: B006
    dilation: list[int] = [1],  # noqa: B006
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor] | None:
    rank = x.dim() - 2
    if not _plain(x) or rank < 1:
        return None
    k, s, p, d = (list(one) * rank if len(one) == 1 else one for one in (kernel, stride or kernel, padding, dilation))
    sizes = []
    for i, size in enumerate(x.shape[2:]):
        room = (size + 2 * p[i] - d[i] * (k[i] - 1) - 1) / s[i]
        count = (ceil if ceil_mode else floor)(room) + 1
        sizes.append(count - 1 if ceil_mode and (count - 1) * s[i] >= size + p[i] else count)
    if min(sizes) < 1:
        return None
    shape = (*x.shape[:2], *sizes)
    return _new(shape, x), torch.empty(shape, dtype=torch.int64, device="meta")


def _concatenation(tensors: list[Tensor], dim: int = 0) -> Tensor | None:
    first = tensors[0]
    if not _plain(*tensors) or any(t.dim() != first.dim() for t in tensors):
        return None
    dim %= first.dim()
    across = {(*t.shape[:dim], *t.shape[dim + 1 :]) for t in tensors}
    if len(across) > 1:
        return None
    return _new((*first.shape[:dim], sum(t.shape[dim] for t in tensors), *first.shape[dim + 1 :]), first)


def _upsampled(x: Tensor, size: list[int] | None, *args: Any) -> Tensor | None:
    if not _plain(x):
        return None
    scales = args[-1] if args else None
    if size is None and isinstance(scales, (list, tuple)):
        size = [floor(n * scale) for n, scale in zip(x.shape[2:], scales, strict=True)]
    if not isinstance(size, (list, tuple)) or len(size) != x.dim() - 2 or min(size) < 1:
        return None
    return _new((*x.shape[:2], *size), x)


def _grid_sample(x: Tensor, grid: Tensor, *_: Any) -> Tensor | None:
    return _new((*x.shape[:2], *grid.shape[1:3]), x) if _plain(x) and len(x) == len(grid) else None


def _alike(x: Tensor, *_: Any) -> Tensor | None:
    return x.clone() if _plain(x) else None


_BY_KERNEL: dict[Kernel, str] = {
    _batch_norm: "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training",
    _convolution: "convolution",
    _product: "mm bmm",
    _product_and_sum: "addmm",
    _reduced: "mean sum amax amin",
    _vector_norm: "linalg_vector_norm",
    _layer_norm: "native_layer_norm",
    _group_norm: "native_group_norm",
    _max_pool: "max_pool2d_with_indices",
    _concatenation: "cat",
    _upsampled: "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d upsample_nearest3d",
    _grid_sample: "grid_sampler_2d",
    _alike: "roll flip _softmax _log_softmax _safe_softmax",
}
_KERNELS = {name: kernel for kernel, names in _BY_KERNEL.items() for name in names.split()}
