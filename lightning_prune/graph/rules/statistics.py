"""Norms, reductions and what works along one dimension: statistics over channels change with their number."""

from __future__ import annotations

import torch
from torch.nn.utils.parametrize import ParametrizationList

from lightning_prune.graph.constraints import CodeSize, Grid
from lightning_prune.graph.elementwise import Operand, combine, parameter_operand
from lightning_prune.graph.labels import Labels, TensorInfo, region
from lightning_prune.graph.operator_call import OperatorCall
from lightning_prune.model_state.recomputing import weight_hooks

PAIRS = (("weight", "bias"), ("running_mean", "running_var"))


def batch_norm(call: OperatorCall) -> TensorInfo:
    """Per channel; a masked scale and shift make the result zero whatever comes in."""
    x = call.args[0]
    info = call.info(x)
    vectors = {name: call.argument(name) for name in ("weight", "bias", "running_mean", "running_var")}
    given = {name: vector for name, vector in vectors.items() if vector is not None}
    # A shift that shares its scale's labels, and a variance its mean's, say nothing more.
    same = {
        two: one
        for one, two in PAIRS
        if one in given and two in given and call.info(given[one]) is call.info(given[two])
    }
    present = {name: parameter_operand(call, vector, 1) for name, vector in given.items() if name not in same}
    own_statistics = bool(call.argument("training")) or vectors["running_mean"] is None
    for labels in info.labels:
        if own_statistics and labels.dims != (1,):
            _freeze_statistic(call, labels)
        if not present:
            # Instance norm without parameters: no tensor says how many channels it has, only its attribute.
            call.space.sizes.append(CodeSize(labels.flat().ids, call.site, attribute="num_features"))

    def is_zero(zeros: tuple[bool, ...]) -> bool:
        zero = dict(zip(("x", *present), zeros, strict=True))
        zero |= {two: zero[one] for two, one in same.items()}
        return (zero.get("weight", False) or (own_statistics and zero["x"])) and zero.get("bias", True)

    out = combine(call, [Operand(x.shape, info), *present.values()], is_zero)
    made = [one.flat().ids for one in out.labels if one.dims == (1,)]
    if instances := own_statistics and len(x) == 1 and call.recorder.modules.stack:
        # Instance norm sees the channels of every image one after the other, and its scale once for each.
        scale = getattr(instances[-1], "weight", None)
        made = [ids[: ids.numel() if scale is None else scale.numel()] for ids in made]
    call.space.norms += [(call.recorder.module, ids) for ids in made]
    return out


def layer_norm(call: OperatorCall) -> TensorInfo:
    """Layer norm and RMS norm: over the last dimensions; channels there change the statistics."""
    x = call.args[0]
    info = call.info(x)
    normalised = set(range(x.dim() - len(call.argument("normalized_shape")), x.dim()))
    over = [labels for labels in info.labels if set(labels.dims) <= normalised]
    centred = call.name == "native_layer_norm"
    for labels in over:
        if centred:
            call.freeze_statistic(labels)
        else:
            _take_mean(call, labels.flat())
    kept = [one if one in over else call.fold(one, set(one.dims) - normalised) for one in info.labels]
    affine = _affine(call)
    own = Operand(x.shape, TensorInfo(tuple(one for one in kept if one is not None), info.data))

    def is_zero(zeros: tuple[bool, ...]) -> bool:
        if all(zeros[1:]) and affine:
            return True
        return zeros[0] and not (centred and over) and call.argument("bias") is None

    return combine(call, [own, *affine], is_zero)


def _affine(call: OperatorCall, dim: int | None = None) -> list[Operand]:
    vectors = (call.argument("weight"), call.argument("bias"))
    return [parameter_operand(call, vector, dim) for vector in vectors if vector is not None]


def group_norm(call: OperatorCall) -> TensorInfo:
    """Group norm: exact when whole groups go; over a single group it is a layer norm."""
    x, groups = call.args[0], call.argument("group")
    info = call.info(x)
    kept = []
    for labels in info.labels:
        flat = call.fold(labels, (1,)) if 1 in labels.dims else None
        if flat is None or groups == 1:
            call.freeze_statistic(labels if flat is None else flat)
        else:
            layout = flat.flat().ids.view(groups, -1)
            call.space.constraints.append(Grid(layout, (0,), call.site, exact=True, attribute="num_groups"))
        kept += [] if flat is None else [flat]
    affine = _affine(call, 1)
    own = Operand(x.shape, TensorInfo(tuple(kept), info.data))
    return combine(call, [own, *affine], lambda zeros: all(zeros[1:]) if affine else zeros[0] and groups > 1)


EXACT = ("sum", "linalg_vector_norm", "norm")  # zeros add nothing to them, however many there are
ZEROS_BECOME_CONSTANTS = ("logsumexp", "argmax", "argmin", "all", "var_mean", "std_mean")


def reduction(call: OperatorCall) -> TensorInfo | list[TensorInfo]:
    """mean, sum, max over positions: free; over channels: a statistic, except sums and norms, which zeros leave."""
    rank = call.args[0].dim()
    dims = call.argument("dim")
    dims = [dims] if isinstance(dims, int) else dims or range(rank)
    reduced = {d % rank for d in dims} if rank else set()
    info = call.info(call.args[0])
    kept = []
    for labels in info.labels:
        left = set(labels.dims) - reduced
        if not left:
            _reduce_channels(call, labels, exact=call.name in EXACT and (info.data or not _inside_weight(call)))
            continue
        folded = call.fold(labels, tuple(left))
        if folded is None:
            continue
        folded = folded.map(lambda tensor: region(tensor, [d for d in range(rank) if d not in reduced]))
        if not call.argument("keepdim", False):
            folded = folded.map(lambda tensor: tensor.squeeze(sorted(reduced)))
        kept.append(folded.constant() if call.name in ZEROS_BECOME_CONSTANTS else folded)
    first = TensorInfo(tuple(kept), info.data)
    return [first, first] if call.name in ("var_mean", "std_mean") else first


def _inside_weight(call: OperatorCall) -> bool:
    """Whether a layer's weight is being computed: what is left of it would change with a norm that counts fewer."""
    stack = call.recorder.modules.stack
    return any(isinstance(module, ParametrizationList) for module in stack) or bool(stack and weight_hooks(stack[-1]))


def _reduce_channels(call: OperatorCall, labels: Labels, *, exact: bool) -> None:
    """A reduction over all the channels: what it takes in must be exactly zero when masked."""
    flat = labels.flat()
    live = torch.broadcast_to(flat.live, flat.ids.shape)
    if not exact and call.name == "mean" and call.info(call.args[0]).data:
        _take_mean(call, flat)
    elif not exact:
        _freeze_statistic(call, flat)
    elif live.any():
        call.freeze_statistic(flat.where(live), "is a constant that enters a sum")
    elif call.info(call.args[0]).data:
        call.mean_over(flat, is_sum=True)
    call.space.mark("must_mask", flat.ids[~live])


def _freeze_statistic(call: OperatorCall, labels: Labels) -> None:
    """A weight that is standardised over its inputs has mean zero over all of them, not over some."""
    if call.info(call.args[0]).data:
        call.freeze_statistic(labels)
    else:
        way_out = "a plain layer with the weight that comes out would be free"
        reason = f"enters a statistic of a weight over channels in {call.where}; {way_out}"
        call.space.freeze(labels.ids, reason, statistics=True)


def _take_mean(call: OperatorCall, flat: Labels) -> None:
    """A mean over all the channels: exact if they are zero when masked and the module can make up for fewer."""
    call.mean_over(flat)
    call.space.mark("must_mask", flat.ids[~torch.broadcast_to(flat.live, flat.ids.shape)])


def loss(call: OperatorCall) -> TensorInfo:
    """mse_loss and the like: both sides lie on the same channels; a mean over these is a statistic."""
    operands = [Operand(tensor.shape, call.info(tensor)) for tensor in call.tensors]
    shape = torch.broadcast_shapes(*(operand.shape for operand in operands))
    out = combine(call, operands, lambda zeros: all(zeros[:2]), shape)
    how = call.argument("reduction", 1)
    if how == 0:  # one loss per element
        return out
    for labels in out.labels:
        _reduce_channels(call, labels, exact=how == 2)
    return TensorInfo((), out.data)


def likelihood(call: OperatorCall) -> TensorInfo:
    """nll_loss: a class is a channel that labels point at."""
    return call.freeze_inputs(f"is a class in {call.where}")


def along(call: OperatorCall) -> TensorInfo:
    """softmax, cumsum, sort: along positions every channel by itself; along channels they need all of them."""
    dim = call.argument("dim", -1) % max(call.args[0].dim(), 1)
    softmax = "softmax" in call.name
    info = call.info(call.args[0])
    kept = []
    for labels in info.labels:
        if labels.dims == (dim,):
            call.space.freeze(labels.ids, f"enters a statistic over channels in {call.where}", statistics=softmax)
            folded = labels if softmax else None
        else:
            folded = call.fold(labels, tuple(d for d in labels.dims if d != dim))
        if folded is not None:
            kept.append((folded.constant() if softmax else folded).region().expand(call.outputs[0].shape))
    return TensorInfo(tuple(kept), info.data)
