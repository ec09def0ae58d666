"""Writing a model to a file, once the file is seen to compute the same."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_prune.engines import Eager, Engine, OnnxEngine, TensorRT
from lightning_prune.engines.base import install_line
from lightning_prune.engines.onnx_file import export_failure
from lightning_prune.errors import ExportError, PruningError, check_choice, first_line
from lightning_prune.export.comparison import ENOUGH, Comparison, compare_program
from lightning_prune.export.deployed import deployed_module, with_outputs
from lightning_prune.export.drafts import traced, write_onnx, write_program
from lightning_prune.export.inputs import compared_inputs, image_size
from lightning_prune.export.loading import onnx_engine, open_program
from lightning_prune.export.metadata import SUFFIX, describe
from lightning_prune.files import check_writable
from lightning_prune.measure import Latency, compare_programs, samples_in
from lightning_prune.model_state.preservation import copy_without_masks
from lightning_prune.plan import Plan

Format = Literal["onnx", "torch_export"]
OPSETS = (17, 26)


@dataclass(frozen=True)
class ExportReport:
    """A file that was written, and how it compares with the model, which ran in eager PyTorch on the CPU.

    Attributes:
        path: of the file.
        format: ``onnx`` or ``torch_export``.
        engine: that ran the file; None: torch, of a ``torch_export``.
        opset: version of ONNX's operators in the file; None: it is no ONNX.
        input_names: of the file.
        output_names: of the file.
        left_out: outputs of the model that the file does not have.
        inputs: number of samples that were compared.
        batch_sizes: they came in.
        max_abs_error: largest absolute difference of any output element.
        max_rel_error: that difference relative to the largest element of the same output.
        tolerance: largest relative error that was accepted.
        agreement: share of the decisions (classes of samples or pixels, boxes) that are the same; None: the outputs
            are no decisions.
        decisions: what they are: ``classes``, ``pixels``, ``boxes``.
        model_latency: of the model in eager PyTorch.
        exported_latency: of the file, on its engine; timed in turns with the model.
        size_bytes: of the file.
    """

    path: Path
    format: Format
    engine: str | None
    opset: int | None
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    left_out: tuple[str, ...]
    inputs: int
    batch_sizes: tuple[int, ...]
    max_abs_error: float
    max_rel_error: float
    tolerance: float
    agreement: float | None
    decisions: str
    model_latency: Latency
    exported_latency: Latency
    size_bytes: int


def export(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    format: Format = "onnx",
    outputs: Sequence[str] | None = None,
    nms: bool = False,
    dynamic_batch: bool = False,
    dynamic_size: bool = False,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset: int | None = None,
    plan: Plan | None = None,
    metadata: Mapping[str, Any] | None = None,
    engine: str | Engine | None = None,
    inputs: Iterable[Any] | None = None,
    samples: int = 32,
    tolerance: float = 1e-4,
    repeats: int = 10,
) -> ExportReport:
    """Write what is deployed of a model, in eval mode, to a file of its own, once it is seen to compute the same.

    ONNX files run in ONNX Runtime, OpenVINO and TensorRT; ``torch_export`` files load with
    ``torch.export.load(path).module()``; neither needs this package. Here `load_exported` opens both, and
    `read_metadata` tells what they say of themselves. The model is left as it is. On failure nothing is written.

    A task of this package exports what is deployed of it: segmentation without auxiliary head, YOLO with decoded
    boxes. So does any module with a method ``deployed()`` that returns the module to be written.

    Args:
        model: dense or reconstructed; a LightningModule too.
        example_inputs: a tensor, a tuple or a dict; the more varied, the stronger the check.
        path: of the file, ending in ``.onnx`` or ``.pt2``.
        format: ``onnx`` (needs ``pip install "lightning-prune[export]"``) or ``torch_export``.
        outputs: that the file has, by name (keys of a dict, ``output_0`` of a sequence); what they do not need is not
            in the file. None: all, but the auxiliary one of torchvision's segmentation networks.
        nms: of a `lightning_prune.tasks.DetectionTask` with a YOLO: suppress overlapping boxes in the file. ONNX only.
        dynamic_batch: leave the number of samples open, instead of fixing that of the example inputs.
        dynamic_size: leave height and width of images (N, C, H, W) open.
        input_names: in an ONNX file; None: the arguments of the model's forward.
        output_names: in an ONNX file; None: as under ``outputs``.
        opset: version of ONNX's operators; None: the exporter's own, which older runtimes take too.
        plan: what the model was pruned by, to be kept in the file.
        metadata: plain data to be kept in the file: metrics, classes, normalisation.
        engine: what the ONNX file is compared and timed on: ``onnxruntime`` (the default), ``openvino``, ``tensorrt``
            or an `lightning_prune.engines.OnnxEngine`.
        inputs: what is compared besides the example, each of its form, such as validation images; None: inputs drawn
            with the example's mean, deviation and range.
        samples: that are compared, if they are drawn.
        tolerance: largest accepted error of an output, relative to its largest element.
        repeats: passes timed, in turns with the model.

    Returns:
        How the file compares with the model: errors, latency of both in milliseconds, bytes.

    Raises:
        ExportError: an unknown format, suffix or output, a missing package, a model that cannot be exported, or one
            whose file computes something else.
        EngineError: the engine is not installed or refuses the file.
        PruningError: the path cannot be written.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = export(model, torch.randn(1, 3, 8, 8), f"{folder}/net.pt2", format="torch_export")
        >>> report.max_rel_error <= report.tolerance, report.inputs
        (True, 32)
    """
    path = Path(path)
    runner = _checked_engine(path, format, engine, dynamic=dynamic_batch or dynamic_size)
    _check_onnx_only(format, nms=nms, input_names=input_names, output_names=output_names, opset=opset)
    about = describe(plan, metadata)
    dense = deployed_module(copy_without_masks(model).cpu().eval(), nms)
    example = _on_cpu(example_inputs)
    if dynamic_batch and not samples_in(example):
        raise ExportError("dynamic_batch: the example inputs are no batch, no first dimension is left to be open")
    if dynamic_size and image_size(example) is None:
        raise ExportError("dynamic_size: there are no images (N, C, H, W) of one size among the example inputs")
    given = None if inputs is None else map(_on_cpu, inputs)
    passes = compared_inputs(example, given, samples, dynamic_batch=dynamic_batch, dynamic_size=dynamic_size)
    try:
        dense, left_out = with_outputs(dense, example, outputs)
    except PruningError:
        raise
    except Exception as error:
        raise ExportError(f"{type(model).__name__} does not run on the example inputs: {first_line(error)}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        draft = Path(folder) / path.name
        try:
            program = traced(dense, example, dynamic_batch, dynamic_size)
            if runner is None:
                written = write_program(program, draft, about)
            else:
                written = write_onnx(program, draft, about, dense, input_names, output_names, opset)
        except PruningError:
            raise
        except OSError as error:
            raise ExportError(f"cannot write {path}: {error.strerror or error}") from error
        except Exception as error:
            raise ExportError(
                f"{type(model).__name__} cannot be exported to {format}: {export_failure(error)}"
            ) from error
        exported = open_program(draft, runner)
        found = compare_program(dense, exported, passes)
        _check_same(found, tolerance, path, runner)
        programs = {"model": (Eager().prepare(dense, example), example), "exported": (exported, example)}
        latency = compare_programs(programs, repeats=repeats)
        size = draft.stat().st_size
        del exported, programs  # an open file cannot be moved everywhere
        draft.replace(path)
    return ExportReport(
        path,
        format,
        None if runner is None else runner.name,
        written.opset,
        tuple(written.inputs),
        tuple(written.outputs),
        left_out,
        found.inputs,
        tuple(sorted({samples_in(each) for each in passes})),
        found.max_abs_error,
        found.max_rel_error,
        tolerance,
        found.agreement,
        getattr(dense, "decisions", "classes"),
        latency["model"],
        latency["exported"],
        size,
    )


def _checked_engine(path: Path, format: str, engine: str | Engine | None, *, dynamic: bool) -> OnnxEngine | None:
    """What runs the file, None for a torch_export; refused are what cannot be before any work."""
    check_choice("format", format, Format, ExportError)
    if path.suffix != SUFFIX[format]:
        raise ExportError(f"a file of format {format} must end in {SUFFIX[format]}, got '{path}'")
    check_writable(path)
    if format == "torch_export":
        if engine is not None:
            raise ExportError("engine: a torch_export runs in torch alone; write format='onnx' for other engines")
        return None
    runner = onnx_engine("onnxruntime" if engine is None else engine)
    runner.check()
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:  # an engine of the user's own did not ask
        raise ExportError(f"onnx needs {', '.join(missing)}: {install_line('export')}")
    if dynamic and isinstance(runner, TensorRT):
        raise ExportError(
            "TensorRT is run on fixed shapes here: leave out dynamic_batch and dynamic_size, or compare the file on "
            "another engine"
        )
    return runner


def _check_onnx_only(format: str, **options: Any) -> None:
    if format != "onnx" and (name := next((name for name, value in options.items() if value), None)):
        raise ExportError(f"{name} is for format 'onnx'; a {format} keeps the names and operators of torch")
    opset = options["opset"]
    if opset is not None and not OPSETS[0] <= opset <= OPSETS[1]:
        raise ExportError(f"opset must lie in {OPSETS[0]}..{OPSETS[1]}, got {opset}")


def _on_cpu(inputs: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), inputs)


def _check_same(found: Comparison, tolerance: float, path: Path, engine: OnnxEngine | None) -> None:
    """Refuse a file that computes something else."""
    where = f" in {engine.name}" if engine is not None else ""
    if found.nan:
        raise ExportError(
            f"the model computes NaN on {found.nan} of the inputs, which can be compared with nothing: its weights "
            "hold NaN (training diverged: take an earlier checkpoint), or it needs other inputs, inputs=[...]; nothing "
            f"was written to {path}"
        )
    if found.max_rel_error > tolerance:
        raise ExportError(
            f"the exported model computes something else{where}: relative error {found.max_rel_error:.1e} over "
            f"{found.inputs} inputs, accepted {tolerance:.1e}; nothing was written to {path}"
        )
    if found.agreement is not None and found.agreement < ENOUGH:
        raise ExportError(
            f"the exported model decides otherwise{where}: {found.same} of {found.decisions} decisions are the same, "
            f"over {found.inputs} inputs; nothing was written to {path}. Where scores are nearly all alike, as those "
            "of an untrained model on noise, rounding decides: give images as inputs=[...]"
        )
