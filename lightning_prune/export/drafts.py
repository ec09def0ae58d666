"""The two kinds of files, before anybody has checked them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_unflatten

from lightning_prune.engines.onnx_file import as_onnx, named, operators_of, traced_program
from lightning_prune.errors import ExportError, first_line
from lightning_prune.export.deployed import drop_unused
from lightning_prune.export.inputs import SIDE, image_size
from lightning_prune.export.metadata import IN_PROGRAM, json_of, tensors_of_onnx, tensors_of_program, write_in_onnx
from lightning_prune.measure import samples_in, with_samples

SIDES = {0: "batch", 2: "height", 3: "width"}


@dataclass(frozen=True)
class Draft:
    """What stands in a draft."""

    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]
    opset: int | None = None


def traced(model: nn.Module, example: Any, dynamic_batch: bool, dynamic_size: bool) -> torch.export.ExportedProgram:
    """Traced, without what no output needs."""
    if dynamic_batch:
        example = with_samples(example, samples_in(example) + 1)  # never 1, which is taken for a constant
    batch = {0: torch.export.Dim("batch")} if dynamic_batch else {}
    program = _of_open_size(model, example, batch) if dynamic_size else traced_program(model, example, batch)
    drop_unused(program)
    return program


def _of_open_size(model: nn.Module, example: Any, batch: Mapping[int, Any]) -> torch.export.ExportedProgram:
    """For images of any size; else from the example's on, as kernels do not fit into small ones; else of multiples."""
    open_, (height, width) = torch.export.Dim, image_size(example) or (0, 0)
    sides = [(open_("height"), open_("width")), (open_("height", min=height), open_("width", min=width))]
    if height % SIDE == width % SIDE == 0:  # networks that halve their maps and add them up insist on these
        sides.append((SIDE * open_("rows"), SIDE * open_("columns")))
    for tall, wide in sides:
        try:
            return traced_program(model, example, {**batch, 2: tall, 3: wide})
        except Exception as error:  # noqa: BLE001
            cause = error
    raise ExportError(
        f"dynamic_size: {type(model).__name__} cannot be exported for images of any size, as if its code fixed one: "
        f"{first_line(cause)}. Leave out dynamic_size and write a file per size; an example whose height and width are "
        f"multiples of {SIDE}, at least {2 * SIDE}, may help"
    ) from cause


def write_program(program: torch.export.ExportedProgram, path: Path, about: Mapping[str, Any]) -> Draft:
    """A program of torch.export, and what it says of itself."""
    spec = program.call_spec.out_spec
    assert spec is not None
    signature = program.graph_signature
    names = named(tree_unflatten(range(spec.num_leaves), spec))
    outputs = dict(zip(names, signature.user_outputs, strict=True))
    written = Draft(
        tensors_of_program(program, {name: name for name in signature.user_inputs}, SIDES),
        tensors_of_program(program, outputs, SIDES),
    )
    content = json_of({**about, "inputs": written.inputs, "outputs": written.outputs})
    torch.export.save(program, path, extra_files={IN_PROGRAM: content})
    return written


def write_onnx(
    program: torch.export.ExportedProgram,
    path: Path,
    about: Mapping[str, Any],
    model: nn.Module,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
    opset: int | None,
) -> Draft:
    """An ONNX file, and what it says of itself.

    Raises:
        ExportError: too few or too many names, or an opset that the exporter does not reach.
    """
    for kind, names, values in (
        ("input", input_names, program.graph_signature.user_inputs),
        ("output", output_names, program.graph_signature.user_outputs),
    ):
        if names is not None and (isinstance(names, str) or len(set(names)) != len(values)):
            raise ExportError(f"{kind}_names: {len(values)} different names are needed, got {names!r}")
    proto = as_onnx(
        program, input_names=input_names, output_names=output_names, opset=opset, operators=operators_of(model)
    )
    version = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    if opset is not None and version != opset:
        raise ExportError(
            f"opset: the exporter could not convert this model to {opset} and wrote {version}; leave opset out"
        )
    written = Draft(tensors_of_onnx(proto.graph.input), tensors_of_onnx(proto.graph.output), version)
    write_in_onnx(proto, {**about, "inputs": written.inputs, "outputs": written.outputs})
    path.write_bytes(proto.SerializeToString())
    return written
