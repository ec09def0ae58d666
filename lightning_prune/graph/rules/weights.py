"""Operators that compute a layer's weight from other tensors."""

from __future__ import annotations

from lightning_prune.graph.elementwise import Operand, combine
from lightning_prune.graph.labels import TensorInfo
from lightning_prune.graph.operator_call import OperatorCall


def weight_norm(call: OperatorCall) -> TensorInfo:
    """Scale times v over its norm, one for every slice along a dimension: those go, what each norm counts stays.

    Only the scale is masked: a zero slice of v would be divided by its norm, 0 / 0.
    """
    v, g = call.args[:2]
    dim = call.argument("dim", 0) % v.dim()
    info = call.info(v)
    along = tuple(labels for labels in info.labels if labels.dims == (dim,))
    others = [labels for labels in info.labels if labels.dims != (dim,)]
    for labels in along:
        call.space.mark("unmasked", labels.ids)
    for labels in others:
        call.freeze_statistic(labels)
    operands = [Operand(v.shape, TensorInfo(along, info.data)), Operand(g.shape, call.info(g))]
    found = combine(call, operands, lambda zeros: zeros[1])
    return found.with_labels([*found.labels, *others])


def fake_quantization(call: OperatorCall) -> TensorInfo:
    """Its scales come from an observer of the whole tensor: all channels stay."""
    return call.freeze_inputs(f"passes a fake quantizer in {call.where}", keep=True)
