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
    for labels in info.labels:
        if labels.dims == (dim,):
            call.space.mark("unmasked", labels.ids)
        else:
            call.freeze_statistic(labels)
    return combine(call, [Operand(v.shape, info), Operand(g.shape, call.info(g))], lambda zeros: zeros[1])


def fake_quantization(call: OperatorCall) -> TensorInfo:
    """Its scales come from an observer of the whole tensor: all channels stay."""
    return call.freeze_inputs(f"passes a fake quantizer in {call.where}", keep=True)
