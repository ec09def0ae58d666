"""Operators that work on each element by itself, that copy, and that make new tensors."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_prune.graph.elementwise import Operand, combine
from lightning_prune.graph.labels import Info, collapse, region, signature
from lightning_prune.graph.operator_call import Context, tensors_out


def elementwise(c: Context) -> Info | list[Info]:
    """Any function of the elements at one place; whether it keeps zeros is asked of the operator itself."""
    tensors = [value for value in (*c.args, *c.kwargs.values()) if isinstance(value, Tensor)]
    operands = [Operand(_real_extents(tensor), c.info(tensor)) for tensor in tensors]
    if not any(operand.info.layers for operand in operands):
        return Info(data=any(o.info.data for o in operands), uniform=all(o.info.uniform for o in operands))
    shape = tensors_out(c.output)[0].shape
    return combine(c.space, operands, shape, lambda zeros: _keeps_zero(c, tensors, zeros), c.where)


def _real_extents(tensor: Tensor) -> torch.Size:
    """Its shape; a dimension that was expanded holds no data of its own and shrinks with what it meets."""
    return torch.Size(size if stride else 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def gate(c: Context) -> Info:
    """``glu``: the first half of the channels times the sigmoid of the second."""
    tensor, dim = c.args[0], c.argument("dim", -1) % c.args[0].dim()
    info, half = c.info(tensor), c.output.shape[dim]
    operands = []
    for start in (0, half):
        layers = tuple(collapse(layer.narrow(dim, start, half)) for layer in info.layers)
        operands.append(Operand(c.output.shape, Info(tuple(layer for layer in layers if signature(layer)), info.data)))
    return combine(c.space, operands, c.output.shape, lambda zeros: zeros[0], c.where)


def _keeps_zero(c: Context, tensors: list[Tensor], zeros: tuple[bool, ...]) -> bool | None:
    scalars = tuple(_hashable(value) for value in (*c.args, *c.kwargs.items()))
    dtypes = tuple(tensor.dtype for tensor in tensors)
    return _probe(c.func, scalars, tuple(c.kwargs), dtypes, zeros)


def _hashable(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _TENSOR
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(item) for item in value)
    return value


_TENSOR = "<tensor>"


@lru_cache(maxsize=4096)
def _probe(
    func: Any,
    scalars: tuple[Any, ...],
    names: tuple[str, ...],
    dtypes: tuple[torch.dtype, ...],
    zeros: tuple[bool, ...],
) -> bool | None:
    """Run the operator on a few numbers: is the result exactly zero when the given operands are? None: infinite."""
    positional = len(scalars) - len(names)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        fill = iter(
            torch.zeros(3, dtype=_wide(dtype)) if zero else _numbers(dtype, generator)
            for dtype, zero in zip(dtypes, zeros, strict=True)
        )
        values = [next(fill) if isinstance(s, str) and s == _TENSOR else s for s in scalars[:positional]]
        named = {
            name: next(fill) if isinstance(value, str) and value == _TENSOR else value
            for name, value in scalars[positional:]
        }
        result = func(*values, **named)
        result = result[0] if isinstance(result, tuple) else result
        if any(zeros) and result.is_floating_point() and not bool(result.isfinite().all()):
            return None
        if not bool((result == 0).all()):
            return False
    return True


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype.is_floating_point else dtype


def _numbers(dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if dtype == torch.bool:
        return torch.tensor([True, True, True])
    values = torch.rand(3, generator=generator, dtype=torch.float64) + 0.5
    return values if dtype.is_floating_point else (values * 3).ceil().to(dtype)


def factory(_: Context) -> Info:
    """zeros, empty, bernoulli_: extents without labels that follow those of whatever they meet."""
    return Info(uniform=True)


def clear(c: Context) -> Info:
    """``zero_``: what is zero anyway may keep its labels."""
    info = c.info(c.args[0])
    return info if info.layers else Info(uniform=True)


def copy_into(c: Context) -> Info:
    """``copy_``: the destination takes the source's labels."""
    destination, source = c.argument("self"), c.argument("src")
    info = c.info(source)
    layers = tuple(layer.expand(destination.shape) for layer in info.layers)
    for layer in c.info(destination).layers:
        if not any(torch.equal(layer, new) for new in layers):
            c.space.freeze(layer, f"is overwritten in {c.where}")
    return Info(layers, data=info.data, uniform=info.uniform)


def same_elements(c: Context) -> Info | list[Info]:
    """clone, detach, _to_copy, dropout: nothing moves."""
    outputs = tensors_out(c.output)
    info = c.info(c.args[0])
    return info if len(outputs) == 1 else [info, *[Info(data=info.data)] * (len(outputs) - 1)]


def restride(c: Context) -> Info:
    """``as_strided_``: how pooling marks its result as channels-last; the elements stay where they are."""
    before = c.recorder.before
    if before is not None and before.shape == c.output.shape and torch.equal(before, c.output):
        return c.recorder.info(c.args[0])
    return c.freeze_inputs(f"is laid out anew by {c.where}")


def write(c: Context) -> Info:
    """``index_put_`` along leading dimensions: the tensor keeps its labels, the values written must have the same."""
    target, indices, values = c.argument("self"), c.argument("indices"), c.argument("values")
    used = [d for d, index in enumerate(indices) if index is not None]
    if used != list(range(len(used))):
        return c.freeze_inputs(f"is written at fixed places by {c.where}")
    rank = target.dim()
    flat = torch.Size([1 if d in used else size for d, size in enumerate(target.shape)])
    operands = []
    for tensor in (target, values):
        info, layers = c.info(tensor), []
        lead = max(tensor.dim() - rank + len(used), 0)
        for layer in info.layers:
            dims = signature(layer)
            if min(dims) < lead:
                c.space.freeze(layer, f"is written at fixed places by {c.where}")
            else:
                sizes = region(layer, dims).shape[lead:]
                layers.append(region(layer, dims).reshape([1] * (rank - len(sizes)) + list(sizes)).expand(flat))
        shape = torch.Size([1] * (rank - tensor.dim() + lead) + list(tensor.shape[lead:]))
        operands.append(Operand(shape, Info(tuple(layers), info.data, info.uniform)))
    if not c.info(target).layers and c.info(target).uniform:
        operands = operands[1:]
    info = combine(c.space, operands, flat, all, c.where)
    return Info(tuple(layer.expand(target.shape) for layer in info.layers), data=True)
