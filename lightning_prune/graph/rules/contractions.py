"""Operators that sum over channels: convolutions and matrix products."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_prune.graph.constraints import CodeSize, Grid, GroupedConvolution
from lightning_prune.graph.elementwise import Operand, combine, parameter_operand
from lightning_prune.graph.label_space import Contraction
from lightning_prune.graph.labels import NO_LABEL, Labels, TensorInfo
from lightning_prune.graph.operator_call import OperatorCall
from lightning_prune.graph.rules.movement import alike
from lightning_prune.model_state.attention import NarrowMultiheadAttention


def convolution(call: OperatorCall) -> TensorInfo:
    """Convolution with or without bias, grouped, depthwise or transposed."""
    if call.args[0].dim() == call.args[1].dim() - 1:
        return call.freeze_inputs(f"passes an unbatched convolution in {call.where}")
    return _convolve(call, groups=call.argument("groups"), transposed=bool(call.argument("transposed", False)))


def deformable_convolution(call: OperatorCall) -> TensorInfo:
    """``torchvision::deform_conv2d``: offsets and masks are laid out by kernel position and stay."""
    for name in ("offset", "mask"):
        call.freeze(call.info(call.argument(name)).labels, f"steers {call.where}")
    if call.argument("groups") != 1 or call.argument("offset_groups") != 1:
        return call.freeze_inputs(f"passes a grouped deformable convolution in {call.where}")
    return _convolve(call, groups=1, transposed=False)


def matrix_product(call: OperatorCall) -> TensorInfo:
    """mm, bmm and their variants that add a tensor: (n, k) @ (k, m) or (b, n, k) @ (b, k, m)."""
    adds = call.name in ("addmm", "baddbmm")
    added, left, right = call.args[:3] if adds else (None, *call.args[:2])
    l_info, r_info = call.labelled(left, left.dim() - 1), call.info(right)
    if left.dim() == 3 and _narrows_heads(call):
        l_info, r_info = (_across_heads(call, info) for info in (l_info, r_info))
    row, column = left.dim() - 2, left.dim() - 1
    alone = any(labels.dims == (dim,) for info, dim in ((l_info, column), (r_info, row)) for labels in info.labels)
    l_inner, l_free = _inner_and_free(call, l_info, left.shape, column, alone)
    r_inner, r_free = _inner_and_free(call, r_info, right.shape, row, alone)
    if l_info.data or not r_info.data:
        reads, weight = l_inner, r_inner
        makes = _along(call, [labels for labels in r_free if labels.dims == (column,)], right.shape[column])
    else:
        reads, weight = r_inner, l_inner
        makes = _along(call, [labels for labels in l_free if labels.dims == (row,)], left.shape[row])
    one_weight = l_info.data != r_info.data
    _contract(call, reads, weight, reads_weight=one_weight)
    if call.recorder.modules.stack and isinstance(call.recorder.modules.stack[-1], (nn.RNNBase, nn.RNNCellBase)):
        call.freeze([makes], f"is the hidden state of a recurrent layer in {call.where}")
    elif one_weight:
        call.space.mark("filter", makes.ids)
    _record(call, weight if one_weight else None, reads, makes)
    operands = []
    for tensor, info, free, inner in ((left, l_info, l_free, column), (right, r_info, r_free, row)):
        flat = torch.Size([1 if d == inner else size for d, size in enumerate(tensor.shape)])
        operands.append(Operand(flat, TensorInfo(tuple(one.region().expand(flat) for one in free), info.data)))
    info = TensorInfo(combine(call, operands, any).labels, l_info.data or r_info.data)
    return _add_bias(call, info, added, channel_dim=column)


def _narrows_heads(call: OperatorCall) -> bool:
    """Whether the heads of an attention get narrower, instead of fewer."""
    inside = call.recorder.modules.stack[-1:]
    return call.site.kind in call.space.narrow or any(isinstance(one, NarrowMultiheadAttention) for one in inside)


def _across_heads(call: OperatorCall, info: TensorInfo) -> TensorInfo:
    """All heads, (batch * heads, n, m), get narrower alike: what lies at the same place of each goes together."""
    return info.with_labels(call.fold(one, (1, 2)) or one for one in info.labels)


def vector_product(call: OperatorCall) -> TensorInfo:
    """mv, dot: of data like a matrix product; of weights alone (spectral norm) a number that all of them make."""
    left, right = call.args[:2]
    l_info, r_info = call.info(left), call.info(right)
    if not (l_info.data or r_info.data):
        reason = f"enters a statistic of the whole weight in {call.where}"
        call.freeze((labels for info in (l_info, r_info) for labels in info.labels), reason)
        return TensorInfo()
    matrix, column = left if left.dim() == 2 else left[None], right[:, None]
    call.recorder.set_info(matrix, l_info if left.dim() == 2 else l_info.moved(lambda tensor: tensor[None]))
    call.recorder.set_info(column, r_info.moved(lambda tensor: tensor[:, None]))
    args = (matrix, column)
    product = OperatorCall(call.space, call.recorder, torch.ops.aten.mm.default, args, {}, matrix @ column)
    found = matrix_product(product)
    return found.moved(lambda tensor: tensor.reshape(call.output.shape))


def reads_input(call: OperatorCall, data: Tensor, weight: Tensor) -> None:
    """A matrix (rows, channels) reads data whose last dimension are channels; nothing is said of its rows."""
    reads = _along(call, call.by_channel(f"varies over the steps of {call.where}", (data.dim() - 1,)), data.shape[-1])
    w_in = _along(call, [one for one in call.info(weight).labels if one.dims == (1,)], weight.shape[1])
    _contract(call, reads, w_in, reads_weight=True)
    _record(call, w_in, reads, Labels(torch.full((1,), NO_LABEL)))


def _convolve(call: OperatorCall, *, groups: int, transposed: bool) -> TensorInfo:
    space, (x, weight), w_info = call.space, call.args[:2], call.info(call.args[1])
    out_dim, in_dim = (1, 0) if transposed else (0, 1)
    x_info = call.labelled(x, 1)
    found = call.by_channel(f"varies over the positions that {call.where} slides over", (0, 1))
    # Kernels that are folded into one another stand for a batch: its samples may go.
    batch = [one for one in found if one.dims == (0,)]
    across = [folded for one in found if one.dims != (0,) and (folded := call.fold(one, (1,))) is not None]
    reads = _along(call, across, x.shape[1])
    others = [labels for labels in w_info.labels if labels.dims not in ((0,), (1,))]
    call.freeze(others, f"varies over the kernel of {call.where}")
    w_out, w_in = (
        _along(call, [one for one in w_info.labels if one.dims == (dim,)], weight.shape[dim])
        for dim in (out_dim, in_dim)
    )
    reads_weight = not w_info.data
    makes = filters = w_out
    depthwise = 1 < groups == x.shape[1]
    one_kernel = depthwise and not w_info.data and (weight.shape[0] // groups) % alike(call, weight, 0) == 0
    if one_kernel and (reads.ids != NO_LABEL).any():
        # As often as there are channels: nothing in it is a channel's own.
        call.freeze(w_info.labels, f"is a part of a kernel that {call.where} repeats")
        space.sizes.append(CodeSize(reads.ids, call.site, attribute="groups"))
        each = call.output.shape[1] // groups
        makes = reads.map(lambda tensor: tensor.repeat_interleave(each))
        blurred = [Labels.along(makes, call.output.shape, 1)]
        blurred += [one.region().expand(call.output.shape) for one in batch]
        return _add_bias(call, TensorInfo(tuple(blurred), x_info.data), call.argument("bias"), channel_dim=1)
    if groups == 1 or (transposed and groups != x.shape[1]):
        _contract(call, reads, w_in, reads_weight=reads_weight)
        if groups > 1:
            space.constraints.append(Grid(reads.ids.reshape(groups, -1), (1,), call.site, exact=True))
            makes = w_out.map(lambda tensor: tensor.repeat(groups))
    elif depthwise:
        # Depthwise: each input channel has filters of its own, which go with it and being masked read only zeros.
        filters = w_in if transposed else w_out
        if transposed:
            makes = w_in.map(lambda tensor: tensor.repeat_interleave(weight.shape[1]))
        each = len(filters.ids) // groups
        _tie_or_freeze(call, reads.map(lambda tensor: tensor.repeat_interleave(each)), filters)
        space.sizes.append(CodeSize(reads.ids, call.site, attribute="groups"))
    else:
        inner = w_in.map(lambda tensor: tensor.repeat(groups))
        space.freeze(inner.ids[reads.ids == NO_LABEL], f"reads an input of fixed size in {call.where}")
        _mask_constants(call, reads, inner)
        if reads_weight:
            space.mark("reader", w_in.ids)
        layout = reads.ids.reshape(groups, -1), w_in.ids, w_out.ids.reshape(groups, -1)
        space.constraints.append(GroupedConvolution(*layout, call.site))
    if reads_weight:
        space.mark("filter", filters.ids)
    _record(call, (filters if depthwise else w_in) if reads_weight else None, reads, makes)
    shape = call.output.shape
    labelled = shape[1] > 1 and (makes.ids != NO_LABEL).any()
    own = [Labels.along(makes, shape, 1)] if labelled else []
    own += [one.region().expand(shape) for one in batch]
    info = TensorInfo(tuple(own), x_info.data or w_info.data)
    return _add_bias(call, info, call.argument("bias"), channel_dim=1)


def _record(call: OperatorCall, weight: Labels | None, reads: Labels, makes: Labels) -> None:
    when = call.recorder.run, call.recorder.order
    one = NO_LABEL if weight is None else int(weight.ids.max())
    call.space.contractions.append(Contraction(call.recorder.module, when, one, reads.ids, makes.ids))


def _add_bias(call: OperatorCall, info: TensorInfo, bias: Tensor | None, channel_dim: int) -> TensorInfo:
    if bias is None:
        return info
    added = parameter_operand(call, bias, channel_dim if bias.dim() == 1 else None)
    return combine(call, [Operand(call.output.shape, info), added], all)


def _along(call: OperatorCall, found: list[Labels], size: int) -> Labels:
    """(size,) labels that vary along one dimension only, tied with each other; without any, -1.

    Every one of some with every one of others (a bilinear pooling, flattened) would all be one: the fewer stay.
    """
    if not found:
        return Labels(torch.full((size,), NO_LABEL))
    first, *others = (labels.flat() for labels in found)
    for other in others:
        both = (first.ids != NO_LABEL) & (other.ids != NO_LABEL)
        if across := _across(first.ids[both], other.ids[both]):
            fewer, first = (other, first) if across[0] >= across[1] else (first, other)
            call.space.freeze(fewer.ids, f"lies across the channels that are read in {call.where}")
            continue
        call.space.tie(first.ids[both], other.ids[both])
        missing = first.ids == NO_LABEL
        first = Labels(torch.where(missing, other.ids, first.ids), torch.where(missing, other.live, first.live))
    return first


def _across(first: Tensor, second: Tensor) -> tuple[int, int] | None:
    """How many there are of each, if every one of the first lies with every one of the second."""
    counts = len(first.unique()), len(second.unique())
    if min(counts) < 2 or counts[0] * counts[1] > len(first):
        return None
    return counts if len(torch.stack([first, second]).unique(dim=1).t()) == counts[0] * counts[1] else None


def _contract(call: OperatorCall, data: Labels, weight: Labels, *, reads_weight: bool) -> None:
    """Tie the two sides of a sum over channels. data, weight: (channels,)."""
    data, weight = _tie_or_freeze(call, data, weight)
    if reads_weight:
        call.space.mark("reader", weight.ids)
    _mask_constants(call, data, weight)


def _mask_constants(call: OperatorCall, data: Labels, weight: Labels) -> None:
    """A masked channel that is not zero (a sigmoid's 0.5, say) adds nothing only if its weight is masked too."""
    live = data.live & (data.ids != NO_LABEL)
    if live.any():
        call.space.mark("must_mask", weight.ids[live & ~weight.live])
        call.space.freeze(weight.ids[live & weight.live], f"is a constant that nothing can mask in {call.where}")


def _tie_or_freeze(call: OperatorCall, data: Labels, weight: Labels) -> tuple[Labels, Labels]:
    """Tie channels to the weights that read them, return both; where one side has no labels the other must stay."""
    if min(int(data.ids.min()), int(weight.ids.min())) == NO_LABEL:
        both = (data.ids != NO_LABEL) & (weight.ids != NO_LABEL)
        call.space.freeze(data.ids[~both], f"is read by weights of fixed size in {call.where}")
        call.space.freeze(weight.ids[~both], f"reads an input of fixed size in {call.where}")
        data, weight = data.where(both), weight.where(both)
    call.space.tie(data.ids, weight.ids)
    return data, weight


def _inner_and_free(
    call: OperatorCall, info: TensorInfo, shape: torch.Size, inner: int, alone: bool
) -> tuple[Labels, list[Labels]]:
    """Labels along the dimension that is summed over, and those that do not vary along it.

    Those that vary along it and others (heads and their width) are tied along one: along the others if any operand
    has channels there alone, else along the sum, so that whole rows go.
    """
    along: list[Labels] = []
    free: list[Labels] = []
    for labels in info.labels:
        summed = inner in labels.dims and (alone or labels.dims == (inner,))
        if inner in labels.dims and not summed:
            call.space.whole.add(call.site.kind)
        folded = call.fold(labels, {inner} if summed else {*labels.dims} - {inner})
        if folded is not None:
            (along if summed else free).append(folded)
    return _along(call, along, shape[inner]), free
