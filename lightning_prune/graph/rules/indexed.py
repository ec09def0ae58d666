"""Operators that take or put values where an index of the data says: free along positions, not along channels."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lightning_prune.graph.elementwise import Operand, combine
from lightning_prune.graph.labels import TensorInfo
from lightning_prune.graph.operator_call import OperatorCall
from lightning_prune.graph.rules.movement import alike, one_slice


def gathering(call: OperatorCall) -> TensorInfo:
    """``gather``: every channel's values at positions that an index says, the same for all or one for each."""
    data, index = call.args[0], call.argument("index")
    if not data.dim():
        return call.freeze_inputs(f"is taken by its number in {call.where}")
    dim, info, taken = call.argument("dim") % data.dim(), call.info(data), []
    for labels in info.labels:
        folded = call.fold(labels, {*labels.dims} - {dim})
        if folded is None or any(index.shape[d] != data.shape[d] for d in folded.dims):
            call.freeze([labels if folded is None else folded], f"is taken by its number in {call.where}")
        else:
            taken.append(folded.region())
    values = Operand(one_slice(data.shape, dim), replace(info, labels=tuple(taken)))
    says_where = Operand(_own_extents(call, index), call.info(index))
    found = combine(call, [values, says_where], lambda zeros: zeros[0])
    return replace(found, data=info.data or says_where.info.data)


def scattering(call: OperatorCall) -> TensorInfo:
    """``scatter``, ``scatter_add``, ``index_add``: every channel's values are put where an index says."""
    data, index = call.args[0], call.argument("index")
    source = call.argument("src", call.argument("source"))
    adds, by_row = isinstance(source, Tensor), call.name == "index_add"
    written = [tensor for tensor, here in ((source, adds), (index, not by_row)) if here]
    fixed = f"is written at fixed places by {call.where}"
    dim = call.argument("dim") % max(data.dim(), 1)
    if any(one_slice(tensor.shape, dim) != one_slice(data.shape, dim) for tensor in written):
        return call.freeze_inputs(fixed)
    if by_row:
        call.freeze(call.info(index).labels, fixed)
    for d in {d for labels in call.info(source).labels for d in labels.dims} - {dim}:
        call.labelled(data, d)
    operands = []
    for tensor in (data, *written):
        info = call.info(tensor)
        folded = [(labels, call.fold(labels, {*labels.dims} - {dim})) for labels in info.labels]
        call.freeze((labels for labels, kept in folded if kept is None), fixed)
        kept = tuple(one.region() for _, one in folded if one is not None)
        extents = _own_extents(call, tensor) if tensor is index else tensor.shape
        operands.append(Operand(one_slice(extents, dim), replace(info, labels=kept)))
    zero = call.argument("value", 1) == 0
    shape = one_slice(data.shape, dim)
    found = combine(call, operands, lambda zeros: zeros[0] and (zeros[1] if adds else zero), shape)
    labels = tuple(one.expand(data.shape) for one in found.labels)
    return replace(found, labels=labels, data=any(operand.info.data for operand in operands))


def _own_extents(call: OperatorCall, index: Tensor) -> torch.Size:
    """Its shape, 1 where it says the same for everything: as often as its partner has channels."""
    return torch.Size(1 if alike(call, index, d) == 1 else size for d, size in enumerate(index.shape))
