"""Operators that work on each element by itself, that copy, and that make new tensors."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_prune.graph.elementwise import Operand, combine
from lightning_prune.graph.labels import NO_LABEL, TensorInfo, Zeros
from lightning_prune.graph.operator_call import OperatorCall


def elementwise(call: OperatorCall) -> TensorInfo:
    """Any function of the elements at one place; whether it keeps zeros is asked of the operator itself."""
    operands = [Operand(_real_extents(tensor), call.info(tensor)) for tensor in call.tensors]
    if not any(operand.info.labels for operand in operands):
        return TensorInfo((), any(o.info.data for o in operands), all(o.info.uniform for o in operands))
    return combine(call, operands, lambda zeros: _keeps_zero(call, zeros))


def _real_extents(tensor: Tensor) -> torch.Size:
    """Its shape; a dimension that was expanded holds no data of its own and shrinks with what it meets."""
    return torch.Size(size if stride else 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def gate(call: OperatorCall) -> TensorInfo:
    """``glu``: the first half of the channels times the sigmoid of the second."""
    dim, shape = call.argument("dim", -1) % call.args[0].dim(), call.output.shape
    info = call.info(call.args[0])
    halves = [info.moved(partial(torch.narrow, dim=dim, start=s, length=shape[dim])) for s in (0, shape[dim])]
    operands = [Operand(shape, TensorInfo(half.labels, info.data)) for half in halves]
    return combine(call, operands, lambda zeros: zeros[0])


def _keeps_zero(call: OperatorCall, zeros: tuple[bool, ...]) -> bool | None:
    dtypes = tuple(tensor.dtype for tensor in call.tensors)
    key = call.func, _key(call.args), _key(tuple(call.kwargs.items())), dtypes, zeros
    if key not in _PROBED:
        if len(_PROBED) >= MOST_PROBES:
            _PROBED.clear()
        _PROBED[key] = _probe(call, dtypes, zeros)
    return _PROBED[key]


MOST_PROBES = 4096
_PROBED: dict[Any, bool | None] = {}


def _key(value: Any) -> Any:
    """Equal for equal arguments, of tensors whatever is in them; 1 is not 1.0."""
    if isinstance(value, Tensor):
        return Tensor
    return tuple(map(_key, value)) if isinstance(value, (list, tuple)) else (type(value), repr(value))


def _probe(call: OperatorCall, dtypes: tuple[torch.dtype, ...], zeros: tuple[bool, ...]) -> bool | None:
    """Run the operator on a few numbers: is the result exactly zero when the given operands are? None: infinite."""
    generator = torch.Generator().manual_seed(0)
    arguments: Any = (call.args, call.kwargs)
    for _ in range(2):
        numbers = [_numbers(dtype, generator, zero) for dtype, zero in zip(dtypes, zeros, strict=True)][::-1]
        args, kwargs = tree_map(lambda one, n=numbers: n.pop() if isinstance(one, Tensor) else one, arguments)
        result = call.func(*args, **kwargs)
        result = result[0] if isinstance(result, tuple) else result
        if any(zeros) and result.is_floating_point() and not bool(result.isfinite().all()):
            return None
        if not bool((result == 0).all()):
            return False
    return True


def _numbers(dtype: torch.dtype, generator: torch.Generator, zero: bool) -> Tensor:
    wide = torch.float64 if dtype.is_floating_point else dtype
    if zero or dtype == torch.bool:
        return torch.full((3,), not zero, dtype=wide)
    values = torch.rand(3, generator=generator, dtype=torch.float64) + 0.5
    return values if dtype.is_floating_point else (values * 3).ceil().to(dtype)


def factory(call: OperatorCall) -> TensorInfo:
    """zeros, empty, bernoulli_: extents without labels that follow those of whatever they meet.

    Ones or noise in the shape of a weight have its channels.
    """
    info = call.info(call.args[0]) if call.name in ("ones_like", "full_like", "rand_like", "randn_like") else None
    if info is None or info.data or not info.labels:
        return TensorInfo(uniform=True, zeros=_zeros(call))
    return info.with_labels(labels.constant() for labels in info.labels)


def _zeros(call: OperatorCall) -> Zeros | None:
    value = call.argument("value" if call.name == "fill" else "fill_value")
    if "zeros" not in call.name and not (isinstance(value, (int, float)) and value == 0):
        return None
    return Zeros(call.site, call.info(call.args[0]).labels if call.name == "zeros_like" else ())


def pattern(_: OperatorCall) -> TensorInfo:
    """``eye``: its elements say which rows and columns go together, so that it cannot shrink with either alone."""
    return TensorInfo()


def clear(call: OperatorCall) -> TensorInfo:
    """``zero_``: what is zero anyway may keep its labels."""
    info = call.info(call.args[0])
    return info if info.labels else TensorInfo(uniform=True, zeros=Zeros(call.site))


def copy_into(call: OperatorCall) -> TensorInfo:
    """``copy_``: the destination takes the source's labels."""
    destination, source = call.argument("self"), call.argument("src")
    info = call.info(source)
    new = tuple(labels.expand(destination.shape) for labels in info.labels)
    if call.recorder.assignments.owns(destination):
        return replace(info, labels=new)  # a parameter's or buffer's own: tied
    for old in call.info(destination).labels:
        came = next((labels.region().ids for labels in new if labels.dims == old.dims), None)
        there = old.region().ids
        if came is None:
            call.freeze([old], f"is overwritten in {call.where}")
            continue
        both = (there != NO_LABEL) & (came != NO_LABEL)
        call.space.tie(there[both], came[both])
        call.space.freeze(torch.cat([there[~both], came[~both]]), f"is overwritten in {call.where}")
    return replace(info, labels=new)


def same_elements(call: OperatorCall) -> TensorInfo:
    """clone, detach, _to_copy, dropout: nothing moves."""
    return call.info(call.args[0])


def restride(call: OperatorCall) -> TensorInfo:
    """``as_strided_``: how pooling marks its result as channels-last; the elements stay where they are."""
    before = call.recorder.before
    if before is not None and before.shape == call.output.shape and torch.equal(before, call.output):
        return call.info(call.args[0])
    return call.freeze_inputs(f"is laid out anew by {call.where}")


def write(call: OperatorCall) -> TensorInfo:
    """``index_put_`` along leading dimensions: the tensor keeps its labels, the values written must have the same."""
    target, indices, values = call.argument("self"), call.argument("indices"), call.argument("values")
    used = [d for d, index in enumerate(indices) if index is not None]
    if used != list(range(len(used))):
        return call.freeze_inputs(f"is written at fixed places by {call.where}")
    rank, info = target.dim(), call.info(target)
    flat = torch.Size([1 if d in used else size for d, size in enumerate(target.shape)])
    operands = []
    for tensor in (target, values):
        known = call.info(tensor)
        lead = max(tensor.dim() - rank + len(used), 0)
        call.freeze(
            (one for one in known.labels if min(one.dims) < lead), f"is written at fixed places by {call.where}"
        )
        late = (labels.region() for labels in known.labels if min(labels.dims) >= lead)
        kept = [labels.map(itemgetter((0,) * lead)).expand(flat) for labels in late]
        operands.append(Operand(tensor.shape[lead:], replace(known, labels=tuple(kept))))
    if not info.labels and info.uniform:
        operands = operands[1:]
    combined = combine(call, operands, all, flat)
    return TensorInfo(tuple(labels.expand(target.shape) for labels in combined.labels), data=True)
