"""What runs a model: eager PyTorch, channels last, compiled, CUDA graphs, ONNX Runtime, OpenVINO, TensorRT.

Here: preparing a model for an engine and running it. Not here: timing it (measure/), files for others (export/).
"""

from __future__ import annotations

from lightning_prune.engines.base import Engine, OnnxEngine, Program
from lightning_prune.engines.onnx_engines import OnnxRuntime, OpenVINO, TensorRT
from lightning_prune.engines.torch_engines import ChannelsLast, Compile, CudaGraphs, Eager
from lightning_prune.errors import EngineError

ENGINES: dict[str, type[Engine]] = {
    engine.name: engine for engine in (Eager, ChannelsLast, Compile, CudaGraphs, OnnxRuntime, OpenVINO, TensorRT)
}
"""The engines that ship, by name."""


def engine_from(engine: str | Engine) -> Engine:
    """An engine by its name, or as it is.

    Raises:
        EngineError: an unknown name, or something else.

    Example:
        >>> engine_from("eager"), engine_from(OnnxRuntime("cpu")).name
        (Eager(), 'onnxruntime')
    """
    if isinstance(engine, Engine):
        return engine
    if isinstance(engine, str) and engine in ENGINES:
        return ENGINES[engine]()
    raise EngineError(f"engine must be one of {', '.join(ENGINES)}, or an Engine of your own, got {engine!r}")


__all__ = [
    "ENGINES",
    "ChannelsLast",
    "Compile",
    "CudaGraphs",
    "Eager",
    "Engine",
    "OnnxEngine",
    "OnnxRuntime",
    "OpenVINO",
    "Program",
    "TensorRT",
    "engine_from",
]
