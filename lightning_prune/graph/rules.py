"""How channels pass through each ATen operator: the only such table.

A rule is ``rule(context) -> Info | list[Info]``, the labels of the outputs. An operator without a rule freezes
every channel that reaches it; nothing is ever assumed to be element-wise. New operators are added by naming them
in `RULES` at the end of this file.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_prune.graph import contraction
from lightning_prune.graph.context import Context, tensors_out
from lightning_prune.graph.elementwise import Operand, combine
from lightning_prune.graph.labels import NO_LABEL, Info, collapse, region, signature, spread

Rule = Callable[["Context"], "Info | list[Info]"]


# --- element by element -------------------------------------------------------------------------------------


def elementwise(c: Context) -> Info:
    """Any function of the elements at one place; whether it keeps zeros is asked of the operator itself."""
    tensors = [value for value in (*c.args, *c.kwargs.values()) if isinstance(value, Tensor)]
    operands = [Operand(tensor.shape, c.info(tensor)) for tensor in tensors]
    if not any(operand.info.layers for operand in operands):
        return Info(data=any(o.info.data for o in operands), uniform=all(o.info.uniform for o in operands))
    return combine(c.space, operands, c.output.shape, lambda zeros: _keeps_zero(c, tensors, zeros), c.where)


def _keeps_zero(c: Context, tensors: list[Tensor], zeros: tuple[bool, ...]) -> bool:
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
) -> bool:
    """Run the operator on a few numbers: is the result exactly zero when the given operands are?"""
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


def copy_into(c: Context) -> Info:
    """``copy_``: the destination takes the source's labels."""
    destination, source = c.argument("self"), c.argument("src")
    info = c.info(source)
    layers = tuple(layer.expand(destination.shape) for layer in info.layers)
    for layer in c.info(destination).layers:
        c.space.freeze(layer, f"is overwritten in {c.where}")
    return Info(layers, data=info.data, uniform=info.uniform)


# --- movement -----------------------------------------------------------------------------------------------


def movement(c: Context) -> Info:
    """Operators that only rearrange: executed on the labels."""
    tensor = c.args[0]
    info = c.info(tensor)
    layers = tuple(collapse(c.func(layer, *c.args[1:])) for layer in info.layers)
    return Info(tuple(layer for layer in layers if signature(layer)), data=info.data, uniform=info.uniform)


def same_elements(c: Context) -> Info:
    """clone, detach, _to_copy: nothing moves."""
    return c.info(c.args[0])


def view(c: Context) -> Info:
    """Reshaping. Channels that get split over several dimensions are frozen: the sizes are fixed in Python."""
    info = c.info(c.args[0])
    layers = []
    for layer in info.layers:
        viewed = collapse(layer.reshape(c.output.shape))
        if len(signature(viewed)) > len(signature(layer)):
            c.space.freeze(layer, f"is split into several dimensions by {c.where}")
        elif signature(viewed):
            layers.append(viewed)
    return Info(tuple(layers), data=info.data, uniform=info.uniform)


def selection(c: Context) -> Info | list[Info]:
    """slice, select, split: free across the channels; along them the bounds are fixed in Python."""
    info = c.info(c.args[0])
    rank = c.args[0].dim()
    dim = c.argument("dim", 0) % max(rank, 1)
    outputs = list(c.output) if isinstance(c.output, (list, tuple)) else [c.output]
    kept: list[list[Tensor]] = [[] for _ in outputs]
    for layer in info.layers:
        moved = c.func(layer, *c.args[1:], **c.kwargs)
        moved = list(moved) if isinstance(moved, (list, tuple)) else [moved]
        if dim not in signature(layer) or all(part.shape == layer.shape for part in moved):
            for part, into in zip(moved, kept, strict=True):
                into.append(part)
        else:
            c.space.freeze(layer, f"is cut at fixed places by {c.where}")
    infos = [Info(tuple(layers), data=info.data, uniform=info.uniform) for layers in kept]
    return infos if isinstance(c.output, (list, tuple)) else infos[0]


def concatenation(c: Context) -> Info:
    """``cat``: along the channels labels follow each other; across them the parts are tied."""
    parts = [part for part in c.argument("tensors") if part.dim() == c.output.dim()]
    dim = c.argument("dim", 0) % c.output.dim()
    along: list[Tensor] = []
    across: list[Operand] = []
    data = False
    for part in parts:
        info = c.info(part)
        data = data or info.data
        values: Tensor | None = None
        others = []
        for layer in info.layers:
            dims = signature(layer)
            if dims == (dim,) and values is None:
                values = region(layer, dims).flatten()
            elif dim in dims:
                c.space.freeze(layer, f"is joined along several dimensions by {c.where}")
            else:
                others.append(layer.narrow(dim, 0, 1))
        along.append(torch.full((part.shape[dim],), NO_LABEL) if values is None else values)
        shape = torch.Size([1 if d == dim else size for d, size in enumerate(part.shape)])
        across.append(Operand(shape, Info(tuple(others), data=info.data, uniform=info.uniform)))
    joined = torch.cat(along)
    shape = torch.Size([1 if d == dim else size for d, size in enumerate(c.output.shape)])
    combined = combine(c.space, across, shape, all, c.where)
    layers = [layer.expand(c.output.shape) for layer in combined.layers]
    if (joined != NO_LABEL).any():
        layers.append(spread(joined, c.output.shape, dim))
    return Info(tuple(layers), data=data)


def padding(c: Context) -> Info:
    """``constant_pad_nd``: free across the channels; along them their number is fixed in Python."""
    info, pad = c.info(c.args[0]), list(c.argument("pad"))
    rank = c.args[0].dim()
    padded = {rank - 1 - k // 2 for k, amount in enumerate(pad) if amount}
    value = c.argument("value", 0)
    layers = []
    for layer in info.layers:
        dims = signature(layer)
        if padded & set(dims):
            c.space.freeze(layer, f"is padded along the channels by {c.where}")
            continue
        values = region(layer, dims)
        if value != 0:
            values = torch.where(values >= 0, values | 1, values)
        layers.append(values.expand(c.output.shape))
    return Info(tuple(layers), data=info.data, uniform=info.uniform)


# --- sums over channels -------------------------------------------------------------------------------------


def convolution(c: Context) -> Info:
    """Convolution with or without bias, grouped, depthwise or transposed."""
    x, weight, bias = c.args[0], c.args[1], c.argument("bias")
    unbatched = x.dim() == weight.dim() - 1
    if unbatched:
        return c.freeze_inputs(f"passes an unbatched convolution in {c.where}")
    info, reads, makes = contraction.convolution(
        c.space,
        (x.shape, c.info(x)),
        (weight.shape, c.info(weight)),
        c.output.shape,
        groups=c.argument("groups"),
        transposed=c.argument("transposed"),
        where=c.where,
    )
    c.calls.append(contraction.Call(c.recorder.module, c.recorder.order, reads, makes))
    return _add_bias(c, info, bias, channel_dim=1)


def matrix_product(c: Context) -> Info:
    """Mm and addmm."""
    with_bias = c.func.overloadpacket._qualified_op_name == "aten::addmm"
    left, right = (c.args[1], c.args[2]) if with_bias else (c.args[0], c.args[1])
    info, reads, makes = contraction.matmul(
        c.space, (left.shape, c.info(left)), (right.shape, c.info(right)), c.output.shape, c.where
    )
    c.calls.append(contraction.Call(c.recorder.module, c.recorder.order, reads, makes))
    return _add_bias(c, info, c.args[0] if with_bias else None, channel_dim=c.output.dim() - 1)


def _add_bias(c: Context, info: Info, bias: Tensor | None, channel_dim: int) -> Info:
    if bias is None:
        return info
    shape = bias.shape
    layers = c.info(bias).layers
    if bias.dim() == 1:
        shape = torch.Size([len(bias) if d == channel_dim else 1 for d in range(c.output.dim())])
        layers = tuple(layer.view(shape) for layer in layers)
    bias_info = Info(layers, data=c.info(bias).data)
    operands = [Operand(c.output.shape, info), Operand(shape, bias_info)]
    return combine(c.space, operands, c.output.shape, all, c.where)


# --- statistics ---------------------------------------------------------------------------------------------


def batch_norm(c: Context) -> list[Info]:
    """Per channel; a masked scale and shift make the result zero whatever comes in."""
    x = c.args[0]
    vectors = [c.argument(name) for name in ("weight", "bias", "running_mean", "running_var")]
    shape = torch.Size([x.shape[1] if d == 1 else 1 for d in range(x.dim())])
    operands = [Operand(x.shape, c.info(x))]
    affine = []
    for position, vector in enumerate(vectors):
        if vector is None:
            continue
        info = c.info(vector)
        if position < 2:
            affine.append(len(operands))
        operands.append(Operand(shape, Info(tuple(layer.view(shape) for layer in info.layers), data=info.data)))
    if c.argument("training") or vectors[2] is None:
        for layer in operands[0].info.layers:
            if signature(layer) != (1,):
                c.space.freeze(layer, f"enters the batch statistics of {c.where}")

    def is_zero(zeros: tuple[bool, ...]) -> bool:
        return len(affine) == 2 and all(zeros[position] for position in affine)

    out = combine(c.space, operands, x.shape, is_zero, c.where)
    for layer in out.layers:
        if signature(layer) == (1,):
            c.norms.append((c.recorder.module, region(layer, (1,)).flatten()))
    return [out, *[Info(data=True)] * (len(tensors_out(c.output)) - 1)]


def reduction(c: Context) -> Info | list[Info]:
    """mean, sum, max over positions: free; over channels: a statistic that changes with their number."""
    tensor = c.args[0]
    rank = tensor.dim()
    dims = c.argument("dim")
    dims = list(range(rank)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    reduced = {d % rank for d in dims} if rank else set()
    keepdim = bool(c.argument("keepdim", False))
    info = c.info(tensor)
    layers = []
    for layer in info.layers:
        if reduced & set(signature(layer)):
            c.space.freeze(layer, f"enters a statistic over channels in {c.where}")
            continue
        for dim in sorted(reduced, reverse=True):
            layer = layer.narrow(dim, 0, 1) if keepdim else layer.select(dim, 0)
        layers.append(layer)
    outputs = tensors_out(c.output)
    first = Info(tuple(layers), data=info.data)
    return [first, *[Info(data=info.data)] * (len(outputs) - 1)]


def spatial(c: Context) -> list[Info]:
    """Pooling and resizing: every channel by itself, zeros stay zero."""
    info = c.info(c.args[0])
    outputs = tensors_out(c.output)
    layers = []
    for layer in info.layers:
        dims = signature(layer)
        if max(dims) >= 2 or len(c.args[0].shape) != len(outputs[0].shape):
            c.space.freeze(layer, f"varies over the positions that {c.where} pools")
        else:
            layers.append(region(layer, dims).expand(outputs[0].shape))
    return [Info(tuple(layers), data=info.data), *[Info(data=info.data)] * (len(outputs) - 1)]


def channel_statistics(c: Context) -> Info:
    """Layer norm, group norm, softmax: the result depends on how many channels there are."""
    return c.freeze_inputs(f"enters a statistic over channels in {c.where}")


# --- the table ----------------------------------------------------------------------------------------------

_GROUPS: dict[Rule, str] = {
    elementwise: (
        "add sub mul div rsub neg abs sqrt rsqrt square pow exp log log2 log1p expm1 reciprocal sin cos tanh atan erf "
        "sign floor ceil round trunc clamp clamp_min clamp_max maximum minimum where masked_fill addcmul addcdiv lerp "
        "relu relu6 leaky_relu elu celu selu silu gelu mish softplus sigmoid log_sigmoid_forward hardsigmoid "
        "hardswish hardtanh hardshrink softshrink threshold _prelu_kernel eq ne lt le gt ge logical_and logical_or "
        "logical_not bitwise_and bitwise_or bitwise_not remainder fmod isnan isinf nan_to_num"
    ),
    factory: (
        "empty zeros ones full arange eye rand randn randperm scalar_tensor empty_like zeros_like ones_like full_like "
        "rand_like randn_like new_empty new_zeros new_ones new_full fill zero bernoulli uniform normal empty_strided "
        "new_empty_strided"
    ),
    copy_into: "copy",
    movement: "t transpose permute unsqueeze squeeze expand",
    same_elements: "clone detach alias _to_copy lift_fresh contiguous",
    view: "view _unsafe_view reshape _reshape_alias",
    selection: "slice select split split_with_sizes unbind narrow",
    concatenation: "cat",
    padding: "constant_pad_nd",
    convolution: "convolution _convolution cudnn_convolution mkldnn_convolution",
    matrix_product: "mm addmm",
    batch_norm: (
        "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm "
        "miopen_batch_norm _batch_norm_with_update batch_norm"
    ),
    reduction: "mean sum amax amin max min var std linalg_vector_norm norm prod",
    spatial: (
        "max_pool2d_with_indices max_pool2d max_pool3d_with_indices avg_pool2d avg_pool3d _adaptive_avg_pool2d "
        "_adaptive_avg_pool3d adaptive_max_pool2d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d "
        "upsample_nearest1d upsample_linear1d upsample_nearest3d mkldnn_max_pool2d"
    ),
    channel_statistics: "native_layer_norm native_group_norm _softmax _log_softmax",
}
RULES: dict[str, Rule] = {name: rule for rule, names in _GROUPS.items() for name in names.split()}


def rule_for(func: Any) -> Rule | None:
    """The rule of an operator; in-place variants follow their plain twin."""
    namespace, name = func.overloadpacket._qualified_op_name.split("::")
    if namespace != "aten":
        return None
    return RULES.get(name) or RULES.get(name.removesuffix("_"))
