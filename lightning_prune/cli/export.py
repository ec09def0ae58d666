"""`export`: a checkpoint as ONNX or as a torch.export program, checked by running it."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from lightning_prune.cli.architecture import Architecture, Checkpoint, naming_input
from lightning_prune.cli.build_model import key_value
from lightning_prune.cli.cost_table import latency_cell
from lightning_prune.cli.measure import asked_for
from lightning_prune.errors import DataError
from lightning_prune.export import ExportReport, export, read_metadata
from lightning_prune.measure import samples_in
from lightning_prune.report.table import TIMES, Column, Table, print_line

NAMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "tensorrt": "TensorRT", None: "torch.export"}
SAMPLES = 32  # that are compared
GENERAL = ("producer", "version", "torch", "inputs", "outputs")  # what every file says of itself


def run(options: argparse.Namespace) -> int:
    """`lightning-prune export CHECKPOINT --format onnx --out net.onnx`."""
    known, files = asked_for([options.checkpoint], options)
    model = known.load(files[0]) if files else known.dense.eval()
    inputs = known.deployed_inputs(*files)
    images = _validation_images(known, model, inputs)
    with naming_input(inputs):
        report = export(
            model,
            inputs,
            options.out,
            format=options.format,
            outputs=options.outputs,
            nms=options.nms,
            dynamic_batch=options.dynamic_batch,
            dynamic_size=options.dynamic_size,
            input_names=options.input_names,
            output_names=options.output_names,
            opset=options.opset,
            plan=files[0].plan if files else None,
            metadata=_metadata(known, model, files, options),
            engine=options.engine,
            inputs=images,
            samples=SAMPLES,
            repeats=options.repeats,
        )
    _show(Console(), report, samples_in(inputs), "inputs drawn like the example" if images is None else "images")
    return 0


def _metadata(
    known: Architecture, model: nn.Module, files: list[Checkpoint], options: argparse.Namespace
) -> dict[str, Any]:
    """What is known: the metrics of the weights, the names of the classes, how images are standardised."""
    found: dict[str, Any] = {}
    if files and files[0].metrics:
        found["metrics"] = dict(files[0].metrics)
    names = getattr(known.data, "class_names", None) or getattr(model, "class_names", None)
    if names:
        found["classes"] = list(names)
    normalisation = getattr(known.data, "normalisation", None)
    if normalisation is not None:
        mean, deviation = normalisation
        found["normalisation"] = {"mean": list(mean), "std": list(deviation)}
    return {**found, **dict(key_value("--metadata", argument) for argument in options.metadata)}


def _validation_images(known: Architecture, model: nn.Module, example: Any) -> list[Tensor] | None:
    """Batches of the recipe's validation images in the example's shape; None: there are none here."""
    from pytorch_lightning.utilities.model_helpers import is_overridden

    data = known.data
    if data is None or not isinstance(example, Tensor) or not is_overridden("val_dataloader", data):
        return None
    found: list[Tensor] = []
    try:
        data.setup("validate")
        for batch in data.val_dataloader():
            images = batch[0] if isinstance(batch, (tuple, list)) else batch
            detector: Any = getattr(model, "detector", None)
            if detector is not None:  # it letterboxes them
                images = detector.example(images)
            if not isinstance(images, Tensor) or (images.shape[1:], images.dtype) != (example.shape[1:], example.dtype):
                return None
            found += images
            if len(found) >= SAMPLES:
                break
    except DataError:  # they are not on this machine
        return None
    whole = min(SAMPLES, len(found)) // len(example) * len(example)
    return list(torch.stack(found[:whole]).split(len(example))) if whole else None


def _show(console: Console, report: ExportReport, samples: int, compared: str) -> None:
    gain = report.model_latency.median / report.exported_latency.median
    columns = Column("runs in"), Column("latency", "ms"), Column("times\nfaster")
    rows = (
        ("PyTorch, eager", latency_cell(report.model_latency), ""),
        (NAMES[report.engine], latency_cell(report.exported_latency), f"{gain:.2f}{TIMES}"),
    )
    console.print()
    console.print(Table(columns, rows, {1: "key"}))
    console.print()
    batches = " and ".join(map(str, report.batch_sizes))
    error = f"max relative error {report.max_rel_error:.1e} (accepted: {report.tolerance:.0e})"
    same = f", {100 * report.agreement:.2f} % of the {report.decisions}" if report.agreement is not None else ""
    print_line(console, f"same outputs{same}: {error}", "green")
    print_line(console, f"compared on {report.inputs} {compared}, at batch size {batches}", "green")
    opset = f", opset {report.opset}" if report.opset else ""
    print_line(console, f"{report.path}: {report.size_bytes / 1e6:,.2f} MB{opset}", "bold")
    content = read_metadata(report.path)
    for kind in ("inputs", "outputs"):
        for name, tensor in content[kind].items():
            shape = f" {TIMES} ".join(map(str, tensor["shape"]))
            print_line(console, f"{kind[:-1]} {name}: {tensor['dtype']}, {shape}", indent="  ")
    if report.left_out:
        print_line(console, f"left out, as nothing that runs needs it: {', '.join(report.left_out)}")
    if further := [name for name in content if name not in GENERAL]:
        print_line(console, f"in the file besides: {', '.join(further)}")
    note = f"median ± half the interquartile range at batch size {samples}, timed in turns on the CPU"
    print_line(console, f"latency: {note}", "dim")
