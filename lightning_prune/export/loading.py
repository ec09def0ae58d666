"""Opening a file that was written: as a program of an engine, or as a module."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_prune.engines import ENGINES, Engine, OnnxEngine, Program, engine_from
from lightning_prune.errors import EngineError, ExportError
from lightning_prune.export.metadata import SUFFIX, check_suffix
from lightning_prune.export.program_files import load_program
from lightning_prune.files import check_readable
from lightning_prune.graph.running import call_model

ONNX_ENGINES = tuple(name for name, engine in ENGINES.items() if issubclass(engine, OnnxEngine))


def onnx_engine(engine: str | Engine) -> OnnxEngine:
    """An engine that runs ONNX files.

    Raises:
        ExportError: another one.
        EngineError: an unknown one.
    """
    chosen = engine_from(engine)
    if not isinstance(chosen, OnnxEngine):
        raise ExportError(
            f"the engine {chosen.name!r} runs no ONNX files: {', '.join(ONNX_ENGINES)} do, or an OnnxEngine of yours"
        )
    return chosen


def load_exported(path: str | os.PathLike[str], *, engine: str | Engine = "onnxruntime") -> nn.Module:
    """Open a file that `export` wrote as a module that runs it, by its suffix.

    An engine on the CPU gets as many threads as torch has now; outputs of ONNX files come as a list.

    Args:
        path: ending in ``.onnx`` or ``.pt2``.
        engine: what runs an ONNX file: ``onnxruntime``, ``openvino``, ``tensorrt``, or an `OnnxEngine`. A ``.pt2`` is
            torch's own.

    Raises:
        ExportError: no such file, a damaged one, another suffix, or an engine that runs no ONNX files.
        EngineError: the engine is not installed or refuses the file.

    Example:
        >>> import tempfile, lightning_prune as lp
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = lp.export(nn.ReLU(), torch.randn(1, 3), f"{folder}/net.pt2", format="torch_export")
        ...     load_exported(report.path)(torch.tensor([[-1.0, 0.0, 2.0]]))
        tensor([[0., 0., 2.]])
    """
    path = Path(path)
    check_suffix(path)
    if path.suffix == SUFFIX["onnx"]:
        check_readable(path, ExportError)
        runner = onnx_engine(engine)
        runner.check()
        try:
            program = runner.load(path.read_bytes())
        except EngineError as error:
            raise EngineError(f"{path}: {error}; export it again") from error
        return _Exported(lambda *args, **kwargs: program.run([*args, *kwargs.values()]))
    return _Exported(load_program(path).module())


def open_program(path: Path, engine: OnnxEngine | None) -> Program:
    """The same as a program; ``engine``: of ONNX files."""
    return engine.load(path.read_bytes()) if engine is not None else _OfTorch(path)


class _OfTorch(Program):
    """A loaded program of torch.export."""

    def __init__(self, path: Path) -> None:
        self._module = load_program(path).module()

    def run(self, inputs: Any) -> Any:
        with torch.no_grad():
            return call_model(self._module, inputs)


class _Exported(nn.Module):
    """A loaded file; what torch.export loads refuses to be put in eval mode, so it is no submodule here."""

    def __init__(self, loaded: Callable[..., Any]) -> None:
        super().__init__()
        self._loaded = [loaded]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._loaded[0](*args, **kwargs)
