"""A model as ONNX, or as a program of torch.export, which ONNX is written from."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_map_only, tree_unflatten

from lightning_prune.errors import EngineError, first_line
from lightning_prune.graph.running import as_args
from lightning_prune.model_state.preservation import copy_without_masks

_VALUES = (
    "; its code decides by computed values (detectors count boxes, for one), which no exporter follows: export the "
    "part without such decisions"
)


def onnx_bytes(model: nn.Module, example_inputs: Any) -> bytes:
    """A model in eval mode, for inputs of these shapes, as the content of an ONNX file.

    Raises:
        EngineError: it cannot be exported.

    Example:
        >>> len(onnx_bytes(nn.ReLU(), torch.zeros(1, 3))) > 0
        True
    """
    own = copy_without_masks(model).cpu().eval()
    inputs = tree_map_only(Tensor, lambda tensor: tensor.detach().cpu(), example_inputs)
    try:
        return as_onnx(traced_program(own, inputs))
    except Exception as error:
        raise EngineError(f"{type(model).__name__} cannot be exported to onnx: {export_failure(error)}") from error


def export_failure(error: Exception) -> str:
    """What the exporter said, and what that means where it is known."""
    return f"{first_line(error)}{_VALUES if 'data-dependent' in str(error) else ''}"


def traced_program(model: nn.Module, inputs: Any, samples: int | None = None) -> torch.export.ExportedProgram:
    """A program of torch.export; ``samples``: size of the first dimension that is left open, if any."""
    args, kwargs = as_args(inputs)
    shapes = None
    if samples is not None:
        batch = torch.export.Dim("batch")
        shapes = torch.export.ShapesCollection()
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == samples:
                shapes[leaf] = {0: batch}
    with _silence(), torch.no_grad():
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)


def as_onnx(program: torch.export.ExportedProgram) -> bytes:
    """The content of an ONNX file."""
    with _silence():
        written = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            output_names=_output_names(program),
            dynamic_shapes=_open_dimensions(program),
        )
    assert written is not None
    return written.model_proto.SerializeToString()


def _output_names(program: torch.export.ExportedProgram) -> list[str] | None:
    """Keys of a dict, numbers in a sequence; None leaves the operators' names, where these would be ambiguous."""
    spec = program.call_spec.out_spec
    assert spec is not None
    paths = [path for path, _ in tree_flatten_with_path(tree_unflatten(range(spec.num_leaves), spec))[0]]
    names = ["_".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path) for path in paths]
    names = [name if name and not name[0].isdigit() else f"output_{name}".rstrip("_") for name in names]
    taken = {node.name for node in program.graph.nodes if node.op == "placeholder"}
    outputs = program.graph_signature.user_outputs
    return names if len({*names} - taken) == len(outputs) == len({*outputs}) else None


def _open_dimensions(program: torch.export.ExportedProgram) -> dict[str, Any] | None:
    """What the open first dimension of the inputs is called in the file."""
    spec = program.call_spec.in_spec
    assert spec is not None
    if not all(argument.is_leaf() for arguments in spec.children() for argument in arguments.children()):
        return None
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    given = {str(name): values[str(name)] for name in program.graph_signature.user_inputs}
    tensors = {name: x for name, x in given.items() if isinstance(x, Tensor) and x.dim()}
    batched = next((name for name, x in tensors.items() if not isinstance(x.shape[0], int)), None)
    # Named once: the other inputs share the dimension, and with it the name.
    return {name: {0: "batch"} if name == batched else None for name in given} if batched else None


@contextmanager
def _silence() -> Iterator[None]:
    """Without the graph that torch.export dumps on standard error when it fails; the exception says why."""
    disabled = logging.root.manager.disable
    try:
        with redirect_stderr(io.StringIO()):
            logging.disable(logging.CRITICAL)
            yield
    finally:
        logging.disable(disabled)
