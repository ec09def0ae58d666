"""A model as a file that runs without this package: ONNX or torch.export, checked by running it."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_prune.engines.onnx_engines import OnnxRuntime
from lightning_prune.engines.onnx_file import as_onnx, export_failure, traced_program
from lightning_prune.errors import ExportError, check_choice, first_line
from lightning_prune.files import check_writable
from lightning_prune.measure import Latency, compare_latency, samples_in, with_samples
from lightning_prune.model_state.preservation import copy_without_masks
from lightning_prune.reconstruction.lossless import check_lossless

Format = Literal["onnx", "torch_export"]
SUFFIX = {"onnx": ".onnx", "torch_export": ".pt2"}
NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch_export": ()}


@dataclass(frozen=True)
class ExportReport:
    """A file that was written, and how it compares with the model; both ran on the CPU.

    Attributes:
        path: of the file.
        format: ``onnx`` or ``torch_export``.
        max_abs_error: largest absolute difference of any output element.
        max_rel_error: that difference relative to the largest element of the same output.
        tolerance: largest relative error that was accepted.
        batch_sizes: that were compared.
        model_latency: of the model in eager PyTorch.
        exported_latency: of the file, in ONNX Runtime or as the loaded program; timed in turns with the model.
        size_bytes: of the file.
    """

    path: Path
    format: Format
    max_abs_error: float
    max_rel_error: float
    tolerance: float
    batch_sizes: tuple[int, ...]
    model_latency: Latency
    exported_latency: Latency
    size_bytes: int


def export(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    format: Format = "onnx",
    dynamic_batch: bool = False,
    tolerance: float = 1e-4,
    repeats: int = 10,
) -> ExportReport:
    """Write a model in eval mode to a file of its own, once the file is seen to compute the same on the CPU.

    ONNX files run in ONNX Runtime, ``torch_export`` files load with ``torch.export.load(path).module()``, where this
    package is not installed; here `load_exported` opens both. The model is left as it is. On failure nothing is
    written.

    Args:
        model: dense or reconstructed; a LightningModule too.
        example_inputs: a tensor, a tuple or a dict; the more varied, the stronger the check.
        path: of the file, ending in ``.onnx`` or ``.pt2``.
        format: ``onnx`` (needs ``pip install "lightning-prune[export]"``) or ``torch_export``.
        dynamic_batch: leave the number of samples open, instead of fixing that of the example inputs.
        tolerance: largest accepted error of an output, relative to its largest element.
        repeats: passes timed, in turns with the model.

    Returns:
        How the file compares with the model: errors, latency of both in milliseconds, bytes.

    Raises:
        ExportError: an unknown format or suffix, a missing package, a model that cannot be exported, or one whose file
            computes something else.
        PruningError: the path cannot be written.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = export(model, torch.randn(1, 3, 8, 8), f"{folder}/net.pt2", format="torch_export")
        >>> report.max_rel_error <= report.tolerance, report.size_bytes > 0
        (True, True)
    """
    path = Path(path)
    _check(path, format)
    dense = copy_without_masks(model).cpu().eval()
    inputs = tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), example_inputs)
    checked = [inputs]
    if dynamic_batch:
        if not samples_in(inputs):
            raise ExportError("dynamic_batch: the example inputs are no batch, no first dimension is left to be open")
        checked.append(with_samples(inputs, samples_in(inputs) + 1))  # and never 1, which is taken for a constant
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        draft = Path(folder) / path.name
        try:
            _write(dense, checked[-1], dynamic_batch, format, draft)
        except Exception as error:
            raise ExportError(
                f"{type(model).__name__} cannot be exported to {format}: {export_failure(error)}"
            ) from error
        try:
            exported = load_exported(draft)
            reports = [check_lossless(dense, exported, each, dtype=None, tolerance=tolerance) for each in checked]
        except Exception as error:
            raise ExportError(f"the exported model does not run: {first_line(error)}") from error
        worst = max(report.max_rel_error for report in reports)
        if not all(report.passed for report in reports):
            raise ExportError(
                f"the exported model computes something else: relative error {worst:.1e}, accepted {tolerance:.1e}; "
                f"nothing was written to {path}"
            )
        latency = compare_latency({"model": (dense, inputs), "exported": (exported, inputs)}, repeats=repeats)
        size = draft.stat().st_size
        del exported  # an open file cannot be moved everywhere
        draft.replace(path)
    return ExportReport(
        path,
        format,
        max(report.max_abs_error for report in reports),
        worst,
        tolerance,
        tuple(map(samples_in, checked)),
        latency["model"],
        latency["exported"],
        size,
    )


def load_exported(path: str | os.PathLike[str]) -> nn.Module:
    """Open a file that `export` wrote as a module that runs it on the CPU, by its suffix.

    ONNX Runtime gets as many threads as torch has now; its outputs come as a list.

    Raises:
        ExportError: another suffix.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = export(nn.ReLU(), torch.randn(1, 3), f"{folder}/net.pt2", format="torch_export")
        ...     load_exported(report.path)(torch.tensor([[-1.0, 0.0, 2.0]]))
        tensor([[0., 0., 2.]])
    """
    path = Path(path)
    if path.suffix not in SUFFIX.values():
        raise ExportError(f"an exported file ends in {' or '.join(SUFFIX.values())}, got '{path}'")
    if path.suffix == SUFFIX["onnx"]:
        program = OnnxRuntime().load(path.read_bytes())
        return _Exported(lambda *args, **kwargs: program.run([*args, *kwargs.values()]))
    return _Exported(torch.export.load(path).module())


def _check(path: Path, format: str) -> None:
    check_choice("format", format, Format, ExportError)
    if path.suffix != SUFFIX[format]:
        raise ExportError(f"a file of format {format} must end in {SUFFIX[format]}, got '{path}'")
    check_writable(path)
    missing = [name for name in NEEDED[format] if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f'{format} needs {", ".join(missing)}: pip install "lightning-prune[export]"')


def _write(model: nn.Module, inputs: Any, dynamic_batch: bool, format: Format, path: Path) -> None:
    program = traced_program(model, inputs, samples_in(inputs) if dynamic_batch else None)
    if format == "torch_export":
        torch.export.save(program, path)
    else:
        path.write_bytes(as_onnx(program))


class _Exported(nn.Module):
    """A loaded file; what torch.export loads refuses to be put in eval mode, so it is no submodule here."""

    def __init__(self, loaded: Callable[..., Any]) -> None:
        super().__init__()
        self._loaded = [loaded]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._loaded[0](*args, **kwargs)
