"""What a file says about itself: who wrote it, what it takes and returns, the plan, what else was given."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_prune import __version__
from lightning_prune.engines.base import install_line
from lightning_prune.errors import ExportError, first_line
from lightning_prune.export.program_files import load_program
from lightning_prune.plan import Plan

if TYPE_CHECKING:
    from onnx import ModelProto

PRODUCER = "lightning-prune"
IN_PROGRAM = "metadata.json"  # the extra file of a program of torch.export
OWN = ("producer", "version", "torch", "inputs", "outputs", "plan")
SUFFIX = {"onnx": ".onnx", "torch_export": ".pt2"}


def describe(plan: Plan | None, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """What is known before a file is written.

    Raises:
        ExportError: metadata that are no plain data, or under a name that is taken.
    """
    given = dict(given or {})
    if taken := [name for name in given if name in OWN]:
        raise ExportError(f"metadata: {taken[0]!r} is written by the export itself; choose another name")
    own = {"producer": PRODUCER, "version": __version__, "torch": torch.__version__}
    content = {**own, **given, **({"plan": plan.to_dict()} if plan is not None else {})}
    for name, value in content.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ExportError(
                f"metadata: {name!r} must be plain data (numbers, strings, lists, dicts), got {_kind(value)}: {error}"
            ) from error
    return content


def json_of(content: Mapping[str, Any]) -> str:
    """For the extra file of a program."""
    return json.dumps(content)


def write_in_onnx(proto: ModelProto, content: Mapping[str, Any]) -> None:
    """As ``metadata_props``, each value as JSON; in place."""
    import onnx

    proto.producer_name, proto.producer_version = PRODUCER, __version__
    onnx.helper.set_model_props(proto, {name: json.dumps(value) for name, value in content.items()})


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a file that `export` wrote says about itself.

    Returns:
        ``producer``, ``version``, ``torch``; ``inputs`` and ``outputs``, by name their shape and type; ``plan`` if one
        was given, for `lightning_prune.Plan.from_dict`; and what was given as ``metadata``. Files of others: their
        properties, as strings where they are no JSON.

    Raises:
        ExportError: no such file, or of another kind.

    Example:
        >>> import tempfile, lightning_prune as lp
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = f"{folder}/net.pt2"
        ...     about = {"format": "torch_export", "metadata": {"acc": 91.2}}
        ...     report = lp.export(torch.nn.ReLU(), torch.rand(1, 3), path, **about)
        ...     found = read_metadata(path)
        >>> found["acc"], found["inputs"]
        (91.2, {'input': {'shape': [1, 3], 'dtype': 'float32'}})
    """
    path = Path(path)
    check_suffix(path)
    try:
        if path.suffix == SUFFIX["onnx"]:
            import onnx

            properties = {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}
            return {name: _from_json(value) for name, value in properties.items()}
        extra = {IN_PROGRAM: ""}
        load_program(path, extra)
        return dict(json.loads(extra[IN_PROGRAM] or "{}"))
    except ExportError:
        raise
    except ModuleNotFoundError as error:
        raise ExportError(f"reading {path} needs {error.name}: {install_line('export')}") from error
    except Exception as error:
        raise ExportError(f"cannot read {path}: {first_line(error)}; export it again") from error


def check_suffix(path: Path) -> None:
    """Refuse a file of another kind."""
    if path.suffix not in SUFFIX.values():
        raise ExportError(f"an exported file ends in {' or '.join(SUFFIX.values())}, got '{path}'")


def tensors_of_onnx(values: Any) -> dict[str, Any]:
    """Shape and type of a graph's inputs or outputs."""
    import onnx

    found = {}
    for value in values:
        kind = value.type.tensor_type
        shape = [d.dim_param or d.dim_value for d in kind.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        found[value.name] = {"shape": shape, "dtype": str(dtype)}
    return found


def tensors_of_program(program: torch.export.ExportedProgram, names: Any, sides: Mapping[int, str]) -> dict[str, Any]:
    """Shape and type of a program's tensors, of which these are the graph's names by those to be told."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    found = {}
    for name, node in names.items():
        if isinstance(x := values.get(node), Tensor):
            shape = [size if isinstance(size, int) else sides.get(d, str(size)) for d, size in enumerate(x.shape)]
            found[name] = {"shape": shape, "dtype": str(x.dtype).removeprefix("torch.")}
    return found


def _from_json(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def _kind(value: Any) -> str:
    return type(value).__name__
