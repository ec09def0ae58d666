"""Operators that move elements: most are simply executed on the labels.

Sizes that the model's Python code passes along (of a view, of the pieces of a split) cannot be seen through; they
are recorded as constraints, see `lightning_prune.graph.constraints`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_prune.graph.constraints import Grid, Split
from lightning_prune.graph.elementwise import Operand, combine
from lightning_prune.graph.labels import NO_LABEL, Labels, TensorInfo
from lightning_prune.graph.operator_call import OperatorCall


def movement(call: OperatorCall) -> TensorInfo:
    """Operators that only rearrange: executed on the labels."""
    if call.name in ("unsqueeze", "flip"):
        _repeats_as_before(call)
    return call.info(call.args[0]).moved(call.rerun)


def repetition(call: OperatorCall) -> TensorInfo:
    """``repeat``: as any other movement; what lies there as often as there are channels is remembered."""
    times, shape = call.argument("repeats"), call.args[0].shape
    sizes = (1,) * (len(times) - len(shape)) + tuple(shape)
    call.recorder.repeats[call.output] = {d: sizes[d] for d, count in enumerate(times) if count > 1}
    return movement(call)


def _repeats_as_before(call: OperatorCall) -> None:
    """Dimensions that are the same, and so are those before them, hold again and again what they held."""
    before, after = call.args[0].shape, call.output.shape
    known = call.recorder.repeats.get(call.args[0], {})
    if kept := {d: size for d, size in known.items() if after[: d + 1] == before[: d + 1]}:
        call.recorder.repeats[call.output] = kept


def alike(call: OperatorCall, tensor: Tensor, dim: int) -> int:
    """After how many entries along a dimension a tensor repeats itself, as code expanded or repeated it."""
    return 1 if tensor.stride(dim) == 0 else call.recorder.repeats.get(tensor, {}).get(dim, tensor.shape[dim])


def expansion(call: OperatorCall) -> TensorInfo:
    """``expand``: sizes of labelled dimensions may be written in the code."""
    return _sized(call, movement(call))


def view(call: OperatorCall) -> TensorInfo:
    """Reshaping. Channels that are laid out over several dimensions may lose whole slices along one of them."""
    _repeats_as_before(call)
    return _sized(call, call.info(call.args[0]).moved(lambda tensor: tensor.reshape(call.output.shape)))


_SIZES_FROM_INPUT = tuple(
    f"torch.nn.modules.{name}"
    for name in ("linear.", "flatten.Flatten", "conv.", "batchnorm.", "instancenorm.", "pooling.", "rnn.")
)


def _sized(call: OperatorCall, info: TensorInfo) -> TensorInfo:
    """Remember sizes that the code may have passed; most of torch's own layers take theirs from the input."""
    if call.site.kind.startswith(_SIZES_FROM_INPUT):
        return info
    for labels in info.labels:
        ids = _grid(labels, labels.dims)
        made = call.made_by
        key = (*call.site.stack[:1], made and (made.code, made.instruction), ids.shape, ids.numpy().tobytes())
        if key not in call.space.seen:  # one line of code
            call.space.seen.add(key)
            layout = Grid(ids, tuple(range(ids.dim())), call.site, call=made, dims=labels.dims, rank=labels.ids.dim())
            call.space.constraints.append(layout)
    return info


def _grid(labels: Labels, dims: tuple[int, ...]) -> Tensor:
    """Ids along the dimensions that vary, in the order ``dims``."""
    rest = (d for d in range(labels.ids.dim()) if d not in dims)
    return labels.region().ids.permute(*dims, *rest).reshape([labels.ids.shape[d] for d in dims])


def selection(call: OperatorCall) -> TensorInfo | list[TensorInfo]:
    """slice, select, split: free across the channels; along them the bounds are sizes of the code."""
    tensor = call.args[0]
    info = call.info(tensor)
    dim = call.argument("dim", 0) % max(tensor.dim(), 1)
    intervals = _intervals(call, dim)
    for labels in info.labels:
        if dim in labels.dims and intervals != [(0, tensor.shape[dim])]:
            _split(call, labels, dim, intervals)
    if not isinstance(call.output, (list, tuple)):
        return info.moved(call.rerun)
    pieces = [labels.pieces(call.rerun) for labels in info.labels]
    return [info.with_labels(labels[k] for labels in pieces) for k in range(len(call.output))]


def _intervals(call: OperatorCall, dim: int) -> list[tuple[int, int]] | None:
    """(start, end) of each piece along the dimension; None: single elements or a step."""
    size = call.args[0].shape[dim]
    if call.name in ("split", "split_with_sizes"):
        return list(itertools.pairwise(itertools.accumulate((piece.shape[dim] for piece in call.output), initial=0)))
    if call.name in ("slice", "narrow") and call.argument("step", 1) == 1:
        start = slice(call.argument("start"), None).indices(size)[0]
        return [(start, start + call.output.shape[dim])]
    return None


def _split(call: OperatorCall, labels: Labels, dim: int, intervals: list[tuple[int, int]] | None) -> None:
    """Remember that the code cuts along channels."""
    others = tuple(d for d in labels.dims if d != dim)
    if others:
        # Whole slices along the other dimensions may go; this one keeps its size, or every piece shrinks alike.
        ids, axes = _grid(labels, (*others, dim)), tuple(range(len(others)))
        lengths = {end - start for start, end in intervals or []}
        if intervals and len(intervals) > 1 and len(lengths) == 1 and max(lengths) > 1:
            ids, axes = ids.unflatten(-1, (len(intervals), -1)), (*axes, len(others) + 1)
        call.space.constraints.append(Grid(ids, axes, call.site))
    elif intervals is None:
        call.freeze([labels], f"is taken by its number in {call.where}")
    else:
        ids = labels.flat().ids
        for known in reversed(call.space.constraints):
            if isinstance(known, Split) and known.site.stack == call.site.stack and torch.equal(known.ids, ids):
                known.intervals += intervals
                return
        call.space.constraints.append(Split(ids, call.site, intervals, len(intervals) > 1, call.made_by))


def index(call: OperatorCall) -> TensorInfo:
    """``x[indices]``: executed on the labels; channels that are picked by number stay."""
    indices = call.argument("indices")
    widths = [1 if one is None or one.dtype not in (torch.bool, torch.uint8) else one.dim() for one in indices]
    ends = itertools.accumulate(widths)
    spans = (range(end - width, end) for one, width, end in zip(indices, widths, ends, strict=True) if one is not None)
    return _picked(call, set(itertools.chain(*spans)))


def pick(call: OperatorCall) -> TensorInfo:
    """``index_select``, ``roll``, ``embedding``, ``unfold``: executed, unless channels themselves are picked."""
    rank = call.args[0].dim()
    if call.name == "embedding":
        # What words say depends on the input, unlike a table of positions.
        return replace(_picked(call, {0}), data=call.info(call.args[0]).data or call.info(call.args[1]).data)
    if call.name == "roll":
        return _picked(call, {d % rank for d in call.argument("dims") or range(rank)})
    return _picked(call, {call.argument("dimension" if call.name == "unfold" else "dim") % rank})


def _picked(call: OperatorCall, dims: set[int]) -> TensorInfo:
    info = call.info(call.args[0])
    call.freeze((one for one in info.labels if dims & set(one.dims)), f"is taken by its number in {call.where}")
    free = (labels for labels in info.labels if not dims & set(labels.dims))
    return info.with_labels(labels.moved(call.rerun) for labels in free)


def shuffle(call: OperatorCall) -> TensorInfo:
    """``channel_shuffle``: every group loses the same number of channels."""
    for labels in call.info(call.args[0]).labels:
        if labels.dims == (1,):
            ids = labels.flat().ids.reshape(call.argument("groups"), -1)
            call.space.constraints.append(Grid(ids, (1,), call.site, exact=True))
        elif 1 in labels.dims:
            return call.freeze_inputs(f"varies over more than the channels shuffled by {call.where}")
    return movement(call)


def unfold_depth(call: OperatorCall) -> TensorInfo:
    """``pixel_shuffle``: the channels that become one channel's positions go together."""
    info, found = call.info(call.args[0]), []
    for labels in info.labels:
        if labels.dims != (1,):
            return call.freeze_inputs(f"varies over more than the channels in {call.where}")
        positions = labels.flat().map(lambda tensor: tensor.reshape(-1, call.argument("upscale_factor") ** 2))
        if (folded := call.fold(positions, (0,))) is None:
            call.freeze([positions], f"makes a single channel in {call.where}")
        else:
            found.append(Labels.along(folded.flat(), call.output.shape, 1))
    return info.with_labels(found)


def concatenation(call: OperatorCall) -> TensorInfo:
    """``cat``: along the channels labels follow each other; across them the parts are tied."""
    dim = call.argument("dim", 0) % call.output.dim()
    parts = [part for part in call.argument("tensors") if part.dim() == call.output.dim()]
    infos = [call.info(part) for part in parts]
    if any(dim in labels.dims for info in infos for labels in info.labels):
        infos = [call.labelled(part, dim) for part in parts]
    both = list(zip(parts, infos, strict=True))
    empty = [Operand(one_slice(part.shape, dim), info) for part, info in both if not part.shape[dim]]
    return _join(call, [Operand(part.shape, info) for part, info in both if part.shape[dim]], dim, empty)


def nothing_of(call: OperatorCall) -> TensorInfo:
    """A slice without elements: its labels are those of one position, as far as what it is joined with has to fit."""
    dim = call.argument("dim", 0) % call.output.dim()
    info = call.info(call.args[0])
    across = (labels for labels in info.labels if dim not in labels.dims)
    return info.with_labels(labels.moved(lambda tensor: tensor.narrow(dim, 0, 1)) for labels in across)


def stack(call: OperatorCall) -> TensorInfo:
    """``stack``: the parts lie side by side in a new dimension, their channels are tied."""
    dim = call.argument("dim", 0) % call.output.dim()
    parts = []
    for part in call.argument("tensors"):
        info = call.info(part)
        labels = tuple(one.map(lambda tensor: tensor.unsqueeze(dim)) for one in info.labels)
        parts.append(Operand(part.unsqueeze(dim).shape, replace(info, labels=labels)))
    return _join(call, parts, dim)


def _join(call: OperatorCall, parts: list[Operand], dim: int, empty: Sequence[Operand] = ()) -> TensorInfo:
    """Parts that follow each other along ``dim``. empty: those without elements, which only have to fit."""
    data = any(part.info.data for part in parts)
    single = [part.info.labels[0] for part in parts if len(part.info.labels) == 1]
    if len(single) == len(parts) and not empty and any(dim in one.dims and len(one.dims) > 1 for one in single):
        return TensorInfo(data=data).with_labels([Labels.joined(single, dim)])

    # Labels along ``dim`` follow each other; those across it are what all parts have in common.
    follow: list[Labels] = []
    across: list[Operand] = [*empty]
    for part in parts:
        own = [labels for labels in part.info.labels if dim in labels.dims]
        lead = next((labels for labels in own if labels.dims == (dim,)), None)
        several = [labels for labels in own if labels is not lead]
        call.freeze(several, f"is joined along several dimensions by {call.where}")
        follow.append(Labels(torch.full((part.shape[dim],), NO_LABEL)) if lead is None else lead.flat())
        others = (labels for labels in part.info.labels if dim not in labels.dims)
        kept = part.info.with_labels(labels.map(lambda tensor: tensor.narrow(dim, 0, 1)) for labels in others)
        across.append(Operand(one_slice(part.shape, dim), kept))
    common = combine(call, across, all, one_slice(call.output.shape, dim))
    joined = Labels.joined(follow)
    found = [
        *(labels.expand(call.output.shape) for labels in common.labels),
        Labels.along(joined, call.output.shape, dim),
    ]
    return TensorInfo(data=data).with_labels(found)


def one_slice(shape: torch.Size, dim: int) -> torch.Size:
    """A shape with one dimension cut to 1."""
    return torch.Size([1 if d == dim else size for d, size in enumerate(shape)])


def padding(call: OperatorCall) -> TensorInfo:
    """``constant_pad_nd``: the padding itself has no labels."""
    info, pad = call.info(call.args[0]), list(call.argument("pad"))
    rank = call.args[0].dim()
    amounts = {rank - 1 - k // 2: (pad[k], pad[k + 1]) for k in range(0, len(pad), 2)}
    found = []
    for labels in info.labels:
        own = {d: amounts[d] for d in labels.dims if any(amounts.get(d, ()))}
        if min((amount for pair in own.values() for amount in pair), default=0) < 0:
            call.freeze([labels], f"is cut at fixed places by {call.where}")
            continue
        around = [amount for d in reversed(range(rank)) for amount in own.get(d, (0, 0))]
        core = labels.region()
        live = torch.constant_pad_nd(core.live, around) if core.live.dim() else core.live
        padded = Labels(torch.constant_pad_nd(core.ids, around, NO_LABEL), live).expand(call.output.shape)
        found.append(padded if call.argument("value", 0) == 0 else padded.constant())
    return replace(info.with_labels(found), zeros=info.zeros if call.argument("value", 0) == 0 else None)
