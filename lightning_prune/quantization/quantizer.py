"""ONNX Runtime's quantizer on a file: which operators, which types, which ranges, and what stays in float."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from lightning_prune.errors import QuantizationError
from lightning_prune.plan.basis import matches

Method = Literal["minmax", "percentile"]
"""How ranges of activations are chosen: all values seen, or all but 0.001 %."""
Cpu = Literal["vnni", "x86", "arm"]
"""Where a file in 8 bits will run: x86 with VNNI instructions, x86 without, ARM."""

# A batch norm that folds into no layer has no kernel in 8 bits: it would run in float behind three conversions.
NEVER = {"BatchNormalization"}
# What computes nothing, between operators that do.
MOVES = {"QuantizeLinear", "DequantizeLinear", "Transpose", "Reshape", "ReorderInput", "ReorderOutput"}


def quantized(
    dense: bytes,
    runs: list[list[Tensor]],
    folder: Path,
    method: Method,
    per_channel: bool,
    ignore: Sequence[str],
    cpu: Cpu,
) -> bytes:
    """The file in 8 bits, with ranges seen on these runs."""
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry
    from onnxruntime.quantization.shape_inference import quant_pre_process

    source, prepared, target = (folder / name for name in ("float.onnx", "prepared.onnx", "quantized.onnx"))
    file = onnx.load_from_string(dense)
    _pool(file)
    onnx.save(file, source)
    quant_pre_process(source, prepared, skip_symbolic_shape=True)  # folds batch norms; shapes are all known
    file = onnx.load(prepared)
    methods = {"minmax": "MinMax", "percentile": "Percentile"}  # Entropy: seven times the error on digits, and hours
    quantize_static(
        prepared,
        target,
        _reader([entry.name for entry in file.graph.input], runs),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=sorted((set(QDQRegistry) | set(QLinearOpsRegistry)) - NEVER),
        nodes_to_exclude=_nodes_of(file, ignore),
        per_channel=per_channel,
        reduce_range=cpu == "x86",
        activation_type=QuantType.QInt8 if cpu == "arm" else QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod[methods[method]],
        extra_options={"CalibStridedMinMax": 1},  # of all methods; else every activation of every run is kept at once
    )
    content = target.read_bytes()
    if not any(node.op_type == "QuantizeLinear" for node in onnx.load_from_string(content).graph.node):
        raise QuantizationError("nothing in this model can be computed in 8 bits")
    return content


def _pool(file: Any) -> None:
    """Means over height and width by their own operator, which exists in 8 bits; a general mean does not."""
    from onnx import numpy_helper

    axes = {value.name: numpy_helper.to_array(value) for value in file.graph.initializer if value.data_type == 7}
    for node in file.graph.node:
        keeps = next((attribute.i for attribute in node.attribute if attribute.name == "keepdims"), 1)
        if node.op_type != "ReduceMean" or len(node.input) < 2 or node.input[1] not in axes or not keeps:
            continue
        if sorted(axes[node.input[1]].tolist()) in ([2, 3], [-2, -1]):
            node.op_type = "GlobalAveragePool"
            del node.input[1:], node.attribute[:]


def _reader(names: list[str], runs: list[list[Tensor]]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._left: Iterator[list[Tensor]] = iter(runs)

        def __len__(self) -> int:
            return len(runs)

        def set_range(self, start_index: int, end_index: int) -> None:
            self._left = iter(runs[start_index:end_index])

        def get_next(self) -> dict[str, Any] | None:
            tensors = next(self._left, None)
            return (
                None if tensors is None else {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
            )

    return Reader()


#: What ONNX Runtime puts before the name of a weight into which it has folded a batch norm that torch had left.
_FUSED = re.compile("^ConvBnFusion_(W|BN_B)_")


def _nodes_of(file: Any, ignore: Sequence[str]) -> list[str]:
    """Names of the nodes that compute these layers, or lie in these modules."""
    weights = {value.name for value in file.graph.initializer}
    layers: dict[str, set[str]] = {}
    for node in file.graph.node:
        scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "[]")
        inside = {part.strip("' ") for part in scopes.strip("[]").split(",")[:-1]}
        owners = {_FUSED.sub("", name).rpartition(".")[0] for name in node.input if name in weights}
        around = {owner[: dot.start()] for owner in owners for dot in re.finditer(r"\.", owner)}
        layers[node.name] = (inside | owners | around) - {""}
    known = set().union(*layers.values())
    for pattern in ignore:
        if not any(matches(pattern, layer) for layer in known):
            raise QuantizationError(f"ignore: no layer matches {pattern!r}; layers are {', '.join(sorted(known))}")
    return [node for node, of in layers.items() if any(matches(pattern, layer) for layer in of for pattern in ignore)]


def float_operators(content: bytes, folder: Path) -> dict[str, int]:
    """What takes floats in the graph that ONNX Runtime makes of the file for this machine."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(folder / "optimized.onnx").graph
    floats = {entry.name for entry in graph.input if entry.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    found: Counter[str] = Counter()
    integer = sum(
        node.op_type in ("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat") for node in graph.node
    )
    if integer > _quantized_layers(onnx.load_from_string(content)):
        raise QuantizationError(
            "ignore: ONNX Runtime computes some of these layers in 8 bits all the same, since what stands before and "
            "behind them is: ignore these layers too, up to the network's input or output"
        )
    for node in graph.node:
        computes = node.op_type not in MOVES
        if node.op_type == "DequantizeLinear" or (node.op_type != "QuantizeLinear" and floats & {*node.input}):
            floats.update(node.output)
            found[node.op_type] += computes
    return {name: count for name, count in sorted(found.items()) if count}


def _quantized_layers(file: Any) -> int:
    """How many layers have their weights in 8 bits, in the file itself."""
    scaled = {node.output[0] for node in file.graph.node if node.op_type == "DequantizeLinear"}
    return sum(node.op_type in ("Conv", "Gemm", "MatMul") and {*node.input[:2]} <= scaled for node in file.graph.node)
