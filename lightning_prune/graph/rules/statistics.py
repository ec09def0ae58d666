"""Norms, reductions and what works along one dimension: statistics over channels change with their number."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_prune.graph.constraints import Grid, Size
from lightning_prune.graph.contraction import fold
from lightning_prune.graph.elementwise import Operand, combine
from lightning_prune.graph.labels import Info, region, signature
from lightning_prune.graph.operator_call import Context, tensors_out


def batch_norm(c: Context) -> list[Info]:
    """Per channel; a masked scale and shift make the result zero whatever comes in."""
    x = c.args[0]
    vectors = {name: c.argument(name) for name in ("weight", "bias", "running_mean", "running_var")}
    shape = torch.Size([x.shape[1] if d == 1 else 1 for d in range(x.dim())])
    operands = [Operand(x.shape, c.info(x))]
    position = {}
    for name, vector in vectors.items():
        if vector is not None:
            info = c.info(vector)
            position[name] = len(operands)
            operands.append(Operand(shape, Info(tuple(layer.view(shape) for layer in info.layers), data=info.data)))
    own_statistics = bool(c.argument("training")) or vectors["running_mean"] is None
    if own_statistics:
        for layer in operands[0].info.layers:
            if signature(layer) != (1,):
                c.space.freeze(layer, f"enters a statistic over channels in {c.where}", statistics=True)

    if not position:
        # Instance norm without parameters: no tensor says how many channels it has, only its attribute.
        for layer in operands[0].info.layers:
            c.space.sizes.append(Size(region(layer, signature(layer)).flatten(), c.place, attribute="num_features"))

    def is_zero(zeros: tuple[bool, ...]) -> bool:
        scaled = ("weight" in position and zeros[position["weight"]]) or (own_statistics and zeros[0])
        return scaled and ("bias" not in position or zeros[position["bias"]])

    out = combine(c.space, operands, x.shape, is_zero, c.where)
    for layer in out.layers:
        if signature(layer) == (1,):
            c.norms.append((c.recorder.module, region(layer, (1,)).flatten()))
    return [out, *[Info(data=True)] * (len(tensors_out(c.output)) - 1)]


def layer_norm(c: Context) -> list[Info]:
    """Layer norm and RMS norm: over the last dimensions; channels there change the statistics."""
    x = c.args[0]
    normalised = set(range(x.dim() - len(c.argument("normalized_shape")), x.dim()))
    layers = []
    over_channels = False
    for layer in c.info(x).layers:
        dims = set(signature(layer))
        if dims <= normalised:
            c.space.freeze(layer, f"enters a statistic over channels in {c.where}", statistics=True)
            over_channels = True
        elif dims & normalised:
            folded = fold(c.space, layer, tuple(dims - normalised), c.where)
            layers += [] if folded is None else [folded]
            continue
        layers.append(layer)
    operands = [Operand(x.shape, Info(tuple(layers), data=c.info(x).data))]
    affine = [vector for vector in (c.argument("weight"), c.argument("bias")) if vector is not None]
    for vector in affine:
        shape = torch.Size([1] * (x.dim() - vector.dim()) + list(vector.shape))
        info = c.info(vector)
        operands.append(Operand(shape, Info(tuple(layer.view(shape) for layer in info.layers), data=info.data)))

    def is_zero(zeros: tuple[bool, ...]) -> bool:
        if all(zeros[1:]) and affine:
            return True
        return zeros[0] and not over_channels and c.argument("bias") is None

    out = combine(c.space, operands, x.shape, is_zero, c.where)
    return [out, *[Info(data=True)] * (len(tensors_out(c.output)) - 1)]


def group_norm(c: Context) -> list[Info]:
    """Group norm: exact when whole groups go; over a single group it is a layer norm."""
    x, groups = c.args[0], c.argument("group")
    channels = x.shape[1]
    shape = torch.Size([channels if d == 1 else 1 for d in range(x.dim())])
    layers = []
    for layer in c.info(x).layers:
        flat = fold(c.space, layer, (1,), c.where) if 1 in signature(layer) else None
        if flat is None:
            c.space.freeze(layer, f"enters a statistic over channels in {c.where}", statistics=True)
            continue
        layers.append(flat)
        values = region(flat, (1,)).flatten()
        if groups == 1:
            c.space.freeze(values, f"enters a statistic over channels in {c.where}", statistics=True)
        else:
            c.space.constraints.append(Grid(values.view(groups, -1), (0,), c.place, exact=True, attribute="num_groups"))
    operands = [Operand(x.shape, Info(tuple(layers), data=c.info(x).data))]
    affine = [vector for vector in (c.argument("weight"), c.argument("bias")) if vector is not None]
    for vector in affine:
        info = c.info(vector)
        operands.append(Operand(shape, Info(tuple(layer.view(shape) for layer in info.layers), data=info.data)))

    def is_zero(zeros: tuple[bool, ...]) -> bool:
        return all(zeros[1:]) if affine else zeros[0] and groups > 1

    out = combine(c.space, operands, x.shape, is_zero, c.where)
    return [out, *[Info(data=True)] * (len(tensors_out(c.output)) - 1)]


EXACT = ("sum", "linalg_vector_norm", "norm")  # zeros add nothing to them, however many there are


def reduction(c: Context) -> Info | list[Info]:
    """mean, sum, max over positions: free; over channels: a statistic, except sums and norms, which zeros leave."""
    tensor = c.args[0]
    rank = tensor.dim()
    dims = c.argument("dim")
    dims = list(range(rank)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
    reduced = {d % rank for d in dims} if rank else set()
    keepdim = bool(c.argument("keepdim", False))
    info = c.info(tensor)
    layers = []
    for layer in info.layers:
        varies = set(signature(layer))
        if varies <= reduced:
            _consume(c, layer)
            continue
        if varies & reduced:
            folded = fold(c.space, layer, tuple(varies - reduced), c.where)
            if folded is None:
                continue
            layer = folded
        for dim in sorted(reduced, reverse=True):
            layer = layer.narrow(dim, 0, 1) if keepdim else layer.select(dim, 0)
        if not _keeps_zeros(c):
            layer = torch.where(layer >= 0, layer | 1, layer)
        layers.append(layer)
    outputs = tensors_out(c.output)
    first = Info(tuple(layers), data=info.data)
    second = first if c.name in ("var_mean", "std_mean") else Info(data=info.data)
    return [first, *[second] * (len(outputs) - 1)]


def _keeps_zeros(c: Context) -> bool:
    return c.name not in ("logsumexp", "argmax", "argmin", "all", "var_mean", "std_mean")


def _consume(c: Context, layer: Tensor) -> None:
    """A reduction over all the channels: what it takes in must be exactly zero when masked."""
    values = region(layer, signature(layer))
    live = values & 1 == 1
    if c.name not in EXACT:
        c.space.freeze(values, f"enters a statistic over channels in {c.where}", statistics=True)
    elif live.any():
        c.space.freeze(values[live], f"is a constant that enters a sum over channels in {c.where}", statistics=True)
    c.space.mark("must_mask", values[~live])


def along(c: Context) -> Info | list[Info]:
    """softmax, cumsum, sort: along positions every channel by itself; along channels they need all of them."""
    tensor = c.args[0]
    dim = c.argument("dim", -1) % max(tensor.dim(), 1)
    info = c.info(tensor)
    outputs = tensors_out(c.output)
    softmax = "softmax" in c.name
    layers = []
    for layer in info.layers:
        dims = signature(layer)
        if dims == (dim,):
            c.space.freeze(layer, f"enters a statistic over channels in {c.where}", statistics=softmax)
            if softmax:
                layers.append(torch.where(layer >= 0, layer | 1, layer))
            continue
        if dim in dims:
            folded = fold(c.space, layer, tuple(d for d in dims if d != dim), c.where)
            if folded is None:
                continue
            layer = folded
        core = region(layer, signature(layer))
        if softmax:
            core = torch.where(core >= 0, core | 1, core)
        layers.append(core.expand(outputs[0].shape))
    return [Info(tuple(layers), data=info.data), *[Info(data=info.data)] * (len(outputs) - 1)]
