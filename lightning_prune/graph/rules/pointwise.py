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
        uniform = all(o.info.uniform or o.shape.numel() == 1 for o in operands)
        return TensorInfo((), any(o.info.data for o in operands), uniform)
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


def _keeps_zero(call: OperatorCall, zeros: tuple[bool, ...]) -> bool | str:
    dtypes = tuple(tensor.dtype for tensor in call.tensors)
    # A learned exponent is positive: another one would make the dense model's own zeros infinite.
    signed = tuple(
        not (call.name == "pow" and number and not call.info(t).data) for number, t in enumerate(call.tensors)
    )
    key = call.func, _key(call.args), _key(tuple(call.kwargs.items())), dtypes, zeros, signed
    if key not in _PROBED:
        if len(_PROBED) >= MOST_PROBES:
            _PROBED.clear()
        _PROBED[key] = _probe(call, dtypes, zeros, signed)
    return _PROBED[key]


MOST_PROBES = 4096
_PROBED: dict[Any, bool | str] = {}


def _key(value: Any) -> Any:
    """Equal for equal arguments, of tensors whatever is in them; 1 is not 1.0."""
    if isinstance(value, Tensor):
        return Tensor
    return tuple(map(_key, value)) if isinstance(value, (list, tuple)) else (type(value), repr(value))


def _probe(
    call: OperatorCall, dtypes: tuple[torch.dtype, ...], zeros: tuple[bool, ...], signed: tuple[bool, ...]
) -> bool | str:
    """Run the operator on numbers: is the result zero when the given operands are, whatever the others are?

    A text: it is infinite there, or its slope is, which makes NaN of a masked model's gradients.
    """
    generator = torch.Generator().manual_seed(0)

    def result_of(nil: float, *, with_zeros: bool) -> Tensor:
        numbers = []
        for dtype, zero, sign in zip(dtypes, zeros, signed, strict=True):
            numbers.append(_nothing(dtype, nil) if zero else _numbers(dtype, generator, sign=sign, zeros=with_zeros))
        numbers.reverse()
        args, kwargs = tree_map(lambda one: numbers.pop() if isinstance(one, Tensor) else one, (call.args, call.kwargs))
        result = call.func(*args, **kwargs)
        result = result[0] if isinstance(result, tuple) else result
        return result if isinstance(result, Tensor) else torch.tensor(result)

    result = result_of(0.0, with_zeros=False)
    if any(zeros) and result.is_floating_point() and not bool(result.isfinite().all()):
        return INFINITE
    others = result_of(0.0, with_zeros=True)  # where the dense model divides by zero too, it is no matter of masks
    if bool((result != 0).any()) or bool(((others != 0) & others.isfinite()).any()):
        return False
    if any(zeros) and result.is_floating_point():
        state = generator.get_state()
        near = []
        for step in (1.0, 2.0):
            generator.set_state(state)
            near.append(result_of(step * TINY, with_zeros=False))
        if bool(((near[1] - near[0]).abs() > TINY * STEEP).any()):
            return STEEP_THERE
    return True


NUMBERS = 16  # that are tried
INFINITE = "is infinite when masked"
STEEP_THERE = "has an infinite slope when masked, so that gradients are NaN (a small number added before would free it)"
TINY, STEEP = 1e-100, 1e20


def _nothing(dtype: torch.dtype, nil: float) -> Tensor:
    return torch.full((NUMBERS,), nil if dtype.is_floating_point else 0, dtype=_wide(dtype))


def _numbers(dtype: torch.dtype, generator: torch.Generator, *, sign: bool, zeros: bool) -> Tensor:
    """(NUMBERS,) of either sign and, if they may be, zero; or larger than 1."""
    if dtype == torch.bool:
        return torch.rand(NUMBERS, generator=generator) < 0.5
    values = torch.rand(NUMBERS, generator=generator, dtype=torch.float64) + 0.5
    flips = torch.rand(NUMBERS, generator=generator) < 0.5
    gone = torch.rand(NUMBERS, generator=generator) < 0.3
    values = values if dtype.is_floating_point or dtype.is_complex else (values * 3).ceil()
    if not sign:
        return (values + 1).to(_wide(dtype))
    values = torch.where(flips, -values, values).to(_wide(dtype))
    return torch.where(gone, 0, values) if zeros and dtype.is_floating_point else values


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype.is_floating_point else dtype


def factory(call: OperatorCall) -> TensorInfo:
    """zeros, empty, uniform_: extents without labels that follow those of whatever they meet.

    Ones or noise in the shape of a weight have its channels.
    """
    info = call.info(call.args[0]) if call.name in ("ones_like", "full_like", "rand_like", "randn_like") else None
    if info is None or info.data or not info.labels:
        return TensorInfo(uniform=True, zeros=_zeros(call))
    return info.with_labels(labels.constant() for labels in info.labels)


def _zeros(call: OperatorCall) -> Zeros | None:
    value = call.argument({"fill": "value", "scalar_tensor": "s"}.get(call.name, "fill_value"))
    if "zeros" not in call.name and not (isinstance(value, (int, float)) and value == 0):
        return None
    return Zeros(call.site, call.info(call.args[0]).labels if call.name == "zeros_like" else ())


def pattern(_: OperatorCall) -> TensorInfo:
    """``eye``, ``arange``: elements that say where they are, so that what they meet cannot lose just any of its own."""
    return TensorInfo()


def triangle(call: OperatorCall) -> TensorInfo:
    """``tril``, ``triu``: zeros at places that the last two dimensions tell."""
    info = call.info(call.args[0])
    if not info.labels:
        return replace(info, uniform=info.uniform and call.output.dim() > 2)  # a mask for every head: heads may go
    last = {call.output.dim() - 2, call.output.dim() - 1}
    call.freeze([one for one in info.labels if last & {*one.dims}], f"is cut to a triangle by {call.where}")
    return replace(info, labels=tuple(one for one in info.labels if not last & {*one.dims}))


def sample(call: OperatorCall) -> TensorInfo:
    """``bernoulli``, ``normal``: drawn anew, or by what the tensors that enter say at each place."""
    if call.func._schema.is_mutable or not any(call.info(tensor).labels for tensor in call.tensors):
        return factory(call)
    chance = call.name == "bernoulli" and call.argument("p") is None  # a chance of zero gives zero
    operands = [Operand(_real_extents(tensor), call.info(tensor)) for tensor in call.tensors]
    return combine(call, operands, lambda zeros: chance and zeros[0])


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
