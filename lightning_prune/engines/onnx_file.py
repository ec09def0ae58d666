"""A model as ONNX, or as a program of torch.export, which ONNX is written from."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_map_only, tree_unflatten

from lightning_prune.engines.base import install_line, version_of
from lightning_prune.errors import EngineError, first_line
from lightning_prune.graph.running import as_args
from lightning_prune.model_state.preservation import copy_without_masks

if TYPE_CHECKING:
    from onnx import ModelProto

# Seen by writing a ResNet: an older torch fails with these versions of the parts of its exporter, and with newer ones.
TORCH_OF_NEWEST = "2.7"
FIRST_TOO_NEW = {"onnxscript": "0.5.4", "onnx-ir": "0.1.16"}

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
        return as_onnx(traced_program(own, inputs), operators=operators_of(own)).SerializeToString()
    except Exception as error:
        raise EngineError(f"{type(model).__name__} cannot be exported to onnx: {export_failure(error)}") from error


def export_failure(error: Exception) -> str:
    """What the exporter said, and what that means where it is known."""
    known = _VALUES if "data-dependent" in str(error) else ""
    if isinstance(error, ModuleNotFoundError):
        known = f": {install_line('export')}"
    if type(error).__module__.startswith(("torch.onnx", "onnx")):
        known += _too_new_for_torch()
    return f"{first_line(error)}{known}"


def _too_new_for_torch() -> str:
    """The way out where torch's exporter is older than the packages that it writes with."""
    if torch.__version__ >= TORCH_OF_NEWEST:
        return ""
    newer = {name: bound for name, bound in FIRST_TOO_NEW.items() if TorchVersion(version_of(name) or "0") >= bound}
    wanted = " ".join(f'"{name}<{bound}"' for name, bound in newer.items())
    return f"; the exporter of torch {torch.__version__} is older: pip install {wanted}" if newer else ""


def traced_program(
    model: nn.Module, inputs: Any, open_dimensions: Mapping[int, Any] | None = None
) -> torch.export.ExportedProgram:
    """A program of torch.export.

    ``open_dimensions``: of the inputs that have so many, {0: batch, 2: height, 3: width} as `torch.export.Dim`; batch
    is left open only in inputs with as many samples as the first.
    """
    args, kwargs = as_args(inputs)
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim()]
    shapes = None
    if open_dimensions:
        shapes = torch.export.ShapesCollection()
        for leaf in leaves:
            sides = {d: dim for d, dim in open_dimensions.items() if d and leaf.dim() == 4}
            batch = {0: open_dimensions[0]} if 0 in open_dimensions and leaf.shape[0] == leaves[0].shape[0] else {}
            if batch or sides:
                shapes[leaf] = {**batch, **sides}
    with _silence(), torch.no_grad():
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)


def as_onnx(
    program: torch.export.ExportedProgram,
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset: int | None = None,
    operators: Mapping[Any, Any] | None = None,
) -> ModelProto:
    """An ONNX model, without what the exporter notes of the machine that it ran on.

    Args:
        program: from `traced_program`.
        input_names: of the file; None: of the arguments of the model's forward.
        output_names: of the file; None: keys of a dict, numbers in a sequence.
        opset: version of ONNX's operators; None: the exporter's.
        operators: how operators that are no torch's are written, {torch operator: function of onnxscript}.
    """
    with _silence():
        written = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=input_names,
            output_names=output_names or _output_names(program),
            opset_version=opset,
            custom_translation_table=dict(operators) if operators else None,
        )
    assert written is not None
    proto: ModelProto = written.model_proto
    _name_open_dimensions(proto, program)
    for node in proto.graph.node:  # not the lines of source files, paths included
        modules = [(each.key, each.value) for each in node.metadata_props if each.key.endswith(".name_scopes")]
        del node.metadata_props[:]
        for key, value in modules:
            node.metadata_props.add(key=key, value=value)
    return proto


def operators_of(model: nn.Module) -> dict[Any, Any]:
    """How the modules say that their own operators are written: their attribute ``onnx_operators``, for `as_onnx`."""
    return {
        operator: function
        for module in model.modules()
        for operator, function in getattr(module, "onnx_operators", {}).items()
    }


def _output_names(program: torch.export.ExportedProgram) -> list[str] | None:
    """None leaves the operators' names, where these would be ambiguous."""
    spec = program.call_spec.out_spec
    assert spec is not None
    names = list(named(tree_unflatten(range(spec.num_leaves), spec)))
    taken = {node.name for node in program.graph.nodes if node.op == "placeholder"}
    outputs = program.graph_signature.user_outputs
    return names if len({*names} - taken) == len(outputs) == len({*outputs}) else None


def named(output: Any) -> dict[str, Any]:
    """What a model returns, by name: keys of a dict, numbers in a sequence.

    Example:
        >>> named({"out": 1, "maps": (2, 3)}), named(4), named((5,))
        ({'out': 1, 'maps_0': 2, 'maps_1': 3}, {'output': 4}, {'output_0': 5})
    """
    found = {}
    for path, leaf in tree_flatten_with_path(output)[0]:
        name = "_".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)
        found[name if name and not name[0].isdigit() else f"output_{name}".rstrip("_")] = leaf
    return found


def _name_open_dimensions(proto: ModelProto, program: torch.export.ExportedProgram) -> None:
    """``batch``, ``height`` and ``width`` for the symbols of torch."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    tensors = [x for name in program.graph_signature.user_inputs if isinstance(x := values.get(str(name)), Tensor)]
    sides = {0: "batch", 2: "height", 3: "width"}
    known = {str(size): sides[d] for x in tensors for d, size in enumerate(x.shape) if not isinstance(size, int)}
    graph = proto.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param in known:
                dimension.dim_param = known[dimension.dim_param]


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
