"""What of a model is deployed: the module that a task says, and of its outputs those that somebody needs."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.export.graph_signature import InputKind

from lightning_prune.engines.onnx_file import named
from lightning_prune.errors import ExportError
from lightning_prune.graph.running import call_model, map_tensors


def deployed_module(model: nn.Module, nms: bool) -> nn.Module:
    """What ``model.deployed()`` returns where there is such a method (tasks of this package have it); else the model.

    Raises:
        ExportError: non-maximum suppression of a model that does not say how.
    """
    method = getattr(model, "deployed", None)
    if nms and not (callable(method) and "nms" in inspect.signature(method).parameters):
        raise ExportError(
            f"nms: {type(model).__name__} has no boxes to suppress: a DetectionTask has, and so has a module with a "
            "method deployed(nms) that returns what is to be exported"
        )
    if not callable(method):
        return model
    try:
        module = method(nms=True) if nms else method()
    except ValueError as error:
        raise ExportError(f"{type(model).__name__} cannot be deployed: {error}") from error
    if not isinstance(module, nn.Module):
        raise ExportError(f"{type(model).__name__}.deployed() must return a module, got {type(module).__name__}")
    return module.eval()


class ChosenOutputs(nn.Module):
    """A model that returns some of its outputs, by name."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model

        def forward(*args: Any, **kwargs: Any) -> dict[str, Any]:
            found = named(model(*args, **kwargs))
            return {name: found[name] for name in names}

        forward.__signature__ = inspect.signature(model.forward)  # type: ignore[attr-defined]  # names the inputs
        self.forward = forward


def with_outputs(model: nn.Module, inputs: Any, names: Sequence[str] | None) -> tuple[nn.Module, tuple[str, ...]]:
    """The model with these outputs alone, and the names of those that are left out.

    None: all of them, but the auxiliary output of torchvision's segmentation networks, which only training needs.

    Raises:
        ExportError: an output that the model does not have.
    """
    with torch.no_grad():
        output = call_model(model, map_tensors(torch.clone, inputs))
    found = named(output)
    if isinstance(names, str):
        names = (names,)
    if names is None:
        if set(found) != {"out", "aux"} or not any(map(_segments, model.modules())):
            return model, ()
        names = ("out",)
    if unknown := [name for name in names if name not in found]:
        raise ExportError(
            f"{type(model).__name__} returns {', '.join(found)}; there is no output {unknown[0]!r} to choose"
        )
    if not names:
        raise ExportError(f"outputs: name at least one of {', '.join(found)}")
    left_out = tuple(name for name in found if name not in names)
    return ChosenOutputs(model, names), left_out


def _segments(module: nn.Module) -> bool:
    return any(kind.__module__.startswith("torchvision.models.segmentation") for kind in type(module).__mro__)


def drop_unused(program: torch.export.ExportedProgram) -> None:
    """Take out of a program, in place, what no output needs: its operators, parameters and buffers."""
    graph, signature = program.graph, program.graph_signature
    graph.eliminate_dead_code(_acts)
    unused = {node.name: node for node in graph.nodes if node.op == "placeholder" and not node.users}
    held = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
    gone = [spec for spec in signature.input_specs if spec.kind in held and spec.arg.name in unused]
    signature.input_specs = [spec for spec in signature.input_specs if spec not in gone]
    for spec in gone:
        graph.erase_node(unused[spec.arg.name])
        for values in (program._state_dict, program._constants):
            values.pop(spec.target, None)
    program.graph_module.recompile()


def _acts(node: torch.fx.Node) -> bool:
    """Whether a node does more than return values: writes to a tensor, say. Drawing random numbers is no such deed."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.is_impure()
    if node.target is torch.ops.aten.batch_norm.default and node.args[5] is False:
        return False  # in training it writes its statistics, and so says its schema
    return node.target._schema.is_mutable
