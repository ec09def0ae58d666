"""A model becomes a file in 8 bits, and how far its outputs moved."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import platform
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.criteria.batches import Loss
from lightning_prune.engines.base import Program
from lightning_prune.engines.onnx_engines import OnnxRuntime
from lightning_prune.engines.onnx_file import onnx_bytes
from lightning_prune.errors import QuantizationError, check_choice, first_line
from lightning_prune.files import atomic, check_writable
from lightning_prune.measure import samples_in
from lightning_prune.quantization.calibration import calibration_runs
from lightning_prune.quantization.quantizer import Cpu, Method, float_operators, quantized

COMPARED = 32  # runs of both files
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
    runs = calibration_runs(model, example_inputs, batches, loss)
    dense = onnx_bytes(model, example_inputs)
    with tempfile.TemporaryDirectory(prefix="lightning-prune.") as folder, _silence():
        try:
            content = quantized(dense, runs, Path(folder), method, per_channel, ignore, cpu)
        except QuantizationError:
            raise
        except Exception as error:
            raise QuantizationError(
                f"ONNX Runtime cannot quantize {type(model).__name__}: {first_line(error)}"
            ) from error
        left = float_operators(content, Path(folder))
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
