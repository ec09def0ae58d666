"""Recurrent layers: what they read is read as by a linear layer; their hidden state keeps its size."""

from __future__ import annotations

from torch import Tensor

from lightning_prune.graph.labels import TensorInfo
from lightning_prune.graph.operator_call import OperatorCall
from lightning_prune.graph.rules.contractions import reads_input

HIDDEN = "is the hidden state of a recurrent layer in"


def gates(call: OperatorCall) -> TensorInfo:
    """``unsafe_split`` of what a cell computed into gates, and the fused cells: nothing of the hidden state goes."""
    return call.freeze_inputs(f"{HIDDEN} {call.where}")


def fused(call: OperatorCall) -> TensorInfo:
    """One layer, or all of them, in a single operator: the first layer's input weights read the channels."""
    if call.name == "_cudnn_rnn":
        weights, stride = call.argument("weight"), call.argument("weight_stride0")
        both = bool(call.argument("bidirectional"))
        first = [weights[direction * stride] for direction in range(1 + both)]
    else:
        first = [call.argument("weight0")]
    for weight in first:
        reads_input(call, call.args[0], weight)
    entered: list[Tensor] = [tensor for tensor in call.tensors if tensor is not call.args[0]]
    for tensor in entered:
        read = any(tensor is weight for weight in first)
        call.freeze(
            (one for one in call.info(tensor).labels if not (read and one.dims == (1,))), f"{HIDDEN} {call.where}"
        )
    return TensorInfo(data=True)


def pack(call: OperatorCall) -> TensorInfo:
    """``_pack_padded_sequence``: samples and time steps become rows, channels stay where they are."""
    info = call.info(call.args[0])
    kept = []
    for labels in info.labels:
        if set(labels.dims) <= {0, 1}:
            call.freeze([labels], f"varies over the steps that {call.where} packs")
        elif (folded := call.fold(labels, range(2, labels.ids.dim()))) is not None:
            kept.append(folded.map(lambda tensor: tensor[0, :1]).expand(call.outputs[0].shape))
    return TensorInfo(tuple(kept), data=True)
