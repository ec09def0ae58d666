"""A model in 8 bits: static quantization of its ONNX file by ONNX Runtime's quantizer, calibrated on real batches.

Here: which operators, which types, which ranges, and how far the outputs moved. Not here: accuracy (experiments/).
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import platform
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_prune.criteria.batches import Loss, each_batch
from lightning_prune.engines.base import Program, tensors_of
from lightning_prune.engines.onnx_engines import OnnxRuntime
from lightning_prune.engines.onnx_file import onnx_bytes
from lightning_prune.errors import QuantizationError, check_choice, first_line
from lightning_prune.files import atomic, check_writable
from lightning_prune.measure import samples_in
from lightning_prune.model_state.preservation import preserved
from lightning_prune.selection.layer_names import matches

Method = Literal["minmax", "percentile"]
Cpu = Literal["vnni", "x86", "arm"]

COMPARED = 32  # runs of both files
# A batch norm that folds into no layer has no kernel in 8 bits: it would run in float behind three conversions.
NEVER = {"BatchNormalization"}
# What computes nothing, between operators that do.
MOVES = {"QuantizeLinear", "DequantizeLinear", "Transpose", "Reshape", "ReorderInput", "ReorderOutput"}
# Modules that are quantized, or prepared for it, by torch.ao or torchao.
PREPARED = {"FakeQuantizeBase", "ObserverBase", "FakeQuantizerBase"}
CONVERTED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized")


@dataclass(frozen=True)
class QuantizationReport:
    """A file in 8 bits, and how it compares with the float model on calibration inputs; lossless it is not.

    Attributes:
        size_bytes: of the file.
        float_bytes: of the same model's file in float32.
        samples: that ranges were calibrated on.
        weight_bits: 8, or 7 where 8 would overflow, see ``cpu`` of `quantize`.
        rel_error: norm of the outputs' difference, relative to the float outputs' norm; of the worst output.
        agreement: share of the samples (or pixels) whose largest output along dimension 1 is the same one; None if the
            model has several outputs, or one without that dimension.
        float_operators: what ONNX Runtime still computes in float: {operator: nodes}.
    """

    size_bytes: int
    float_bytes: int
    samples: int
    weight_bits: int
    rel_error: float
    agreement: float | None
    float_operators: Mapping[str, int]


def quantize(
    model: nn.Module,
    example_inputs: Any,
    batches: Iterable[Any],
    path: str | os.PathLike[str],
    *,
    loss: Loss | None = None,
    method: Method = "minmax",
    per_channel: bool = True,
    ignore: Sequence[str] = (),
    cpu: Cpu | None = None,
) -> QuantizationReport:
    """Write a model in eval mode as an ONNX file whose layers compute in 8 bits, with ranges seen on real batches.

    Prune first: a file in 8 bits cannot be pruned. Weights become signed, one scale per output channel; the ranges of
    activations are fixed by the batches. ONNX Runtime and OpenVINO run the file (``QuantizeLinear`` and
    ``DequantizeLinear`` around each operator). On failure nothing is written.

    Args:
        model: dense or reconstructed; left as it is.
        example_inputs: a tensor, a tuple or a dict; the file takes these shapes.
        batches: some hundred samples of the training data, in the form of the example inputs but for the number of
            samples; or in any form, with ``loss``.
        path: of the file, ending in ``.onnx``.
        loss: ``loss(model, batch)`` runs the model on a batch, as for criteria; what it returns does not matter.
        method: ranges hold every value seen (``minmax``) or all but 0.001 % of them (``percentile``).
        per_channel: one scale per output channel; else one per weight.
        ignore: names or patterns of layers, or of modules around some, that stay in float.
        cpu: where the file will run; None: on a machine like this. ``vnni``: x86 with such instructions, unsigned
            activations. ``x86``: without, where pairs of products are added in 16 bits: 7 bits of weights do not
            overflow. ``arm``: signed activations.

    Returns:
        Sizes, errors on up to 32 of the calibration inputs, and which operators stayed in float.

    Raises:
        QuantizationError: the model is quantized or prepared for it already, batches do not fit it, no layer matches a
            name in ``ignore``, nothing can be quantized, or an unknown setting.
        EngineError: ONNX Runtime is missing, or the model cannot be exported.
        PruningError: the path cannot be written.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> images = [torch.rand(4, 3, 8, 8) for _ in range(4)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = quantize(model, images[0][:1], images, f"{folder}/net.int8.onnx")
        >>> report.samples, report.rel_error < 0.1, report.float_operators
        (16, True, {})
    """
    path, runtime = Path(path), OnnxRuntime()
    check_choice("method", method, Method, QuantizationError)
    cpu = _this_cpu() if cpu is None else cpu
    check_choice("cpu", cpu, Cpu, QuantizationError)
    if path.suffix != ".onnx":
        raise QuantizationError(f"a quantized file must end in .onnx, got '{path}'")
    check_writable(path)
    runtime.check()
    refuse_quantized(model)
    runs = _calibration_runs(model, example_inputs, batches, loss)
    dense = onnx_bytes(model, example_inputs)
    with tempfile.TemporaryDirectory(prefix="lightning-prune.") as folder, _silence():
        try:
            content = _quantized(dense, runs, Path(folder), method, per_channel, ignore, cpu)
        except QuantizationError:
            raise
        except Exception as error:
            raise QuantizationError(
                f"ONNX Runtime cannot quantize {type(model).__name__}: {first_line(error)}"
            ) from error
        left = _float_operators(content, Path(folder))
    rel_error, agreement = _compared(runtime.load(dense), runtime.load(content), runs[:COMPARED])
    with atomic(path) as stream:
        stream.write(content)
    samples = len(runs) * max(1, samples_in(example_inputs))
    bits = 7 if cpu == "x86" else 8
    return QuantizationReport(len(content), len(dense), samples, bits, rel_error, agreement, left)


def refuse_quantized(model: nn.Module) -> None:
    """Refuse a model that torch.ao or torchao has quantized, or prepared for it.

    Raises:
        QuantizationError: naming the module and the way out.
    """
    for name, module in model.named_modules():
        bases = {base.__name__ for base in type(module).__mro__}
        if bases & PREPARED:
            raise QuantizationError(
                f"{name} is {type(module).__name__}: the model is prepared for torch's own quantization, whose ranges "
                "no ONNX file takes over. Quantize the float model instead, as it was before prepare or prepare_qat; "
                "or go on with torch: prune, prepare_qat, train, convert"
            )
        if type(module).__module__.startswith(CONVERTED):
            raise QuantizationError(
                f"{name} is {type(module).__name__} of {type(module).__module__}: the model is quantized already; "
                "quantize the float model that it came from"
            )


# Calibration


def _calibration_runs(
    model: nn.Module, example_inputs: Any, batches: Iterable[Any], loss: Loss | None
) -> list[list[Tensor]]:
    """Inputs of the shapes of the example, on the CPU, one list of tensors per run."""
    example = tensors_of(example_inputs)
    size = samples_in(example_inputs)
    runs: list[list[Tensor]] = []
    none = QuantizationError("batches is empty: there is nothing to calibrate on")
    with preserved(model), torch.no_grad():
        model.eval()
        for batch in each_batch(model, batches, none):
            for given in [batch] if loss is None else _inputs_of(model, batch, loss):
                tensors = [tensor.detach().cpu() for tensor in tensors_of(_in_order(example_inputs, given))]
                _check_fit(example, tensors, size, given, loss)
                runs += _cut(example, tensors, size)
    if not runs:
        raise QuantizationError(
            f"every batch holds fewer samples than the example inputs, which hold {size}: give an example of one sample"
        )
    return runs


def _in_order(example_inputs: Any, given: Any) -> Any:
    """Named inputs in the order of the example's, which is that of the file."""
    if isinstance(example_inputs, Mapping) and isinstance(given, Mapping) and example_inputs.keys() == given.keys():
        return {name: given[name] for name in example_inputs}
    return given


def _inputs_of(model: nn.Module, batch: Any, loss: Loss) -> list[Any]:
    """What the model is called with while the loss runs it."""
    seen: list[Any] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((*args, *kwargs.values()) if args else kwargs)

    hook = model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        loss(model, batch)
    finally:
        hook.remove()
    if not seen:
        raise QuantizationError(f"loss never called {type(model).__name__}, so there are no inputs to calibrate on")
    return seen


def _check_fit(example: list[Tensor], tensors: list[Tensor], size: int, given: Any, loss: Loss | None) -> None:
    def shape(tensor: Tensor, like: Tensor) -> list[Any]:
        return ["samples" if size and not number and len(like) == size else n for number, n in enumerate(tensor.shape)]

    alike = len(example) == len(tensors) and all(
        one.dim() == other.dim() and one.dtype == other.dtype and shape(one, one) == shape(other, one)
        for one, other in zip(example, tensors, strict=True)
    )
    if not alike:
        found, wanted = ([f"{list(t.shape)} {str(t.dtype)[6:]}" for t in side] for side in (tensors, example))
        hint = "; loss=lambda model, batch: model(batch[0]) runs the model on images that come with labels"
        raise QuantizationError(
            f"a batch holds {', '.join(found) or type(given).__name__} where the example inputs hold "
            f"{', '.join(wanted)}{hint if loss is None else ''}"
        )


def _cut(example: list[Tensor], tensors: list[Tensor], size: int) -> list[list[Tensor]]:
    """A batch as runs of as many samples as the example has; what is left over is not used."""
    if not size:
        return [tensors]
    count = min(len(tensor) for one, tensor in zip(example, tensors, strict=True) if one.dim() and len(one) == size)

    def part(one: Tensor, tensor: Tensor, start: int) -> Tensor:
        return tensor[start : start + size] if one.dim() and len(one) == size else tensor

    starts = range(0, count - size + 1, size)
    return [[part(one, tensor, start) for one, tensor in zip(example, tensors, strict=True)] for start in starts]


# The quantizer


def _quantized(
    dense: bytes,
    runs: list[list[Tensor]],
    folder: Path,
    method: Method,
    per_channel: bool,
    ignore: Sequence[str],
    cpu: Cpu,
) -> bytes:
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


def _nodes_of(file: Any, ignore: Sequence[str]) -> list[str]:
    """Names of the nodes that compute these layers, or lie in these modules."""
    weights = {value.name for value in file.graph.initializer}
    layers: dict[str, set[str]] = {}
    for node in file.graph.node:
        scopes = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), "[]")
        inside = {part.strip("' ") for part in scopes.strip("[]").split(",")[:-1]}
        owners = {name.rpartition(".")[0] for name in node.input if name in weights}
        layers[node.name] = (inside | owners) - {""}
    known = set().union(*layers.values())
    for pattern in ignore:
        if not any(matches(pattern, layer) for layer in known):
            raise QuantizationError(f"ignore: no layer matches {pattern!r}; layers are {', '.join(sorted(known))}")
    return [node for node, of in layers.items() if any(matches(pattern, layer) for layer in of for pattern in ignore)]


def _float_operators(content: bytes, folder: Path) -> dict[str, int]:
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


def _compared(dense: Program, quantized: Program, runs: list[list[Tensor]]) -> tuple[float, float | None]:
    """Relative error of the worst output, and how often a single output's largest entry is the same."""
    sides = [[program.run(tuple(run)) for run in runs] for program in (dense, quantized)]
    before, after = ([torch.stack(values).double() for values in zip(*side, strict=True)] for side in sides)
    worst = max(
        float((one - other).norm() / one.norm().clamp_min(torch.finfo(torch.float32).tiny))
        for one, other in zip(before, after, strict=True)
    )
    if len(before) > 1 or before[0].dim() < 3 or before[0].shape[2] < 2:  # stacked: (runs, samples, classes, ...)
        return worst, None
    return worst, float((before[0].argmax(2) == after[0].argmax(2)).double().mean())


# This machine


def _this_cpu() -> Cpu:
    machine = platform.machine().lower()
    if machine in ("arm64", "aarch64"):
        return "arm"
    flags = Path("/proc/cpuinfo")
    if flags.is_file():
        return "vnni" if "vnni" in flags.read_text("utf-8", "replace") else "x86"
    return "vnni" if getattr(torch.cpu, "_is_vnni_supported", lambda: False)() else "x86"


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without what ONNX Runtime's quantizer prints, logs and warns; what fails says so by an exception."""
    import onnxruntime

    disabled = logging.root.manager.disable
    onnxruntime.set_default_logger_severity(3)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            logging.disable(logging.CRITICAL)
            yield
    finally:
        logging.disable(disabled)
        onnxruntime.set_default_logger_severity(2)  # its own default
