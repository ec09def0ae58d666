"""Convolutions and matrix products: the recorded arguments handed to `lightning_prune.graph.contraction`."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_prune.graph import contraction
from lightning_prune.graph.elementwise import Operand, combine
from lightning_prune.graph.labels import Info
from lightning_prune.graph.operator_call import Context


def convolution(c: Context) -> Info:
    """Convolution with or without bias, grouped, depthwise or transposed."""
    x, weight = c.args[0], c.args[1]
    if x.dim() == weight.dim() - 1:
        return c.freeze_inputs(f"passes an unbatched convolution in {c.where}")
    return _convolve(c, groups=c.argument("groups"), transposed=bool(c.argument("transposed", False)))


def deformable_convolution(c: Context) -> Info:
    """``torchvision::deform_conv2d``: offsets and masks are laid out by kernel position and stay."""
    for name in ("offset", "mask"):
        for layer in c.info(c.argument(name)).layers:
            c.space.freeze(layer, f"steers {c.where}")
    if c.argument("groups") != 1 or c.argument("offset_groups") != 1:
        return c.freeze_inputs(f"passes a grouped deformable convolution in {c.where}")
    return _convolve(c, groups=1, transposed=False)


def _convolve(c: Context, *, groups: int, transposed: bool) -> Info:
    x, weight = c.args[0], c.args[1]
    info, reads, makes = contraction.convolution(
        c.space,
        (x.shape, c.info(x)),
        (weight.shape, c.info(weight)),
        c.output.shape,
        groups=groups,
        transposed=transposed,
        place=c.place,
    )
    c.calls.append(contraction.Call(c.recorder.module, (c.recorder.run, c.recorder.order), reads, makes))
    return _add_bias(c, info, c.argument("bias"), channel_dim=1)


def matrix_product(c: Context) -> Info:
    """mm, bmm and their variants that add a tensor."""
    adds = c.name in ("addmm", "baddbmm", "_addmm_activation")
    left, right = (c.args[1], c.args[2]) if adds else (c.args[0], c.args[1])
    info, reads, makes = contraction.matmul(
        c.space, (left.shape, c.info(left)), (right.shape, c.info(right)), c.output.shape, c.where
    )
    c.calls.append(contraction.Call(c.recorder.module, (c.recorder.run, c.recorder.order), reads, makes))
    return _add_bias(c, info, c.args[0] if adds else None, channel_dim=c.output.dim() - 1)


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
