"""Engines of PyTorch itself: eager, channels last, compiled, CUDA graphs."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_prune.engines.base import Engine, Program, tensors_of
from lightning_prune.errors import EngineError, first_line
from lightning_prune.graph.running import call_model, map_tensors
from lightning_prune.model_state.copying import copied

F = TypeVar("F", bound=Callable[..., Any])


class Eager(Engine):
    """The model as it is, masks and hooks included."""

    name = "eager"

    def prepare(self, model: nn.Module, example_inputs: Any) -> Program:  # noqa: ARG002
        """Nothing to do; see `Engine.prepare`."""
        return _Calls(call_model, model)


class ChannelsLast(Engine):
    """A copy of the model whose weights, and whose images, lie in memory channel by channel."""

    name = "channels_last"

    def prepare(self, model: nn.Module, example_inputs: Any) -> Program:  # noqa: ARG002
        """Copy the model into that memory format; see `Engine.prepare`."""
        own = copied(model)
        for parameter in own.parameters():
            parameter.data = _last(parameter.data)
        return _Calls(lambda model, inputs: call_model(model, map_tensors(_last, inputs)), own)


class Compile(Engine):
    """What `torch.compile` makes of the model.

    Args:
        options: keyword arguments of `torch.compile`, such as ``{"mode": "max-autotune"}`` or
            ``{"options": {"freezing": True}}``, which folds batch norms.
    """

    name = "compile"

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        self.options = dict(options or {})

    def prepare(self, model: nn.Module, example_inputs: Any) -> Program:
        """Compile and run once; see `Engine.prepare`."""
        program = _Calls(torch.compile(_with_code_of_its_own(call_model), **{"dynamic": False, **self.options}), model)
        try:
            program.run(example_inputs)
        except Exception as error:
            raise EngineError(f"torch.compile cannot run {type(model).__name__}: {first_line(error)}") from error
        return program

    def __repr__(self) -> str:
        return f"Compile({self.options or ''})"


class CudaGraphs(Engine):
    """One recorded CUDA graph: a pass without the launches of its kernels, one by one."""

    name = "cuda_graphs"

    def prepare(self, model: nn.Module, example_inputs: Any) -> Program:
        """Warm up and record; see `Engine.prepare`."""
        device = device_of(model)
        if device.type != "cuda":
            raise EngineError(f"the engine 'cuda_graphs' needs a model on a GPU of NVIDIA, and this one is on {device}")
        return _Recorded(model, example_inputs)


class _Calls(Program):
    """A function called with model and inputs."""

    def __init__(self, call: Callable[[nn.Module, Any], Any], model: nn.Module) -> None:
        self._call, self._model = call, model
        device = device_of(model)
        self._device = None if device.type == "cpu" else device

    def run(self, inputs: Any) -> Any:
        with torch.no_grad():  # inference_mode would poison what a model caches for later, such as anchors
            output = self._call(self._model, inputs)
        if self._device is not None:
            torch.accelerator.synchronize(self._device)
        return output


class _Recorded(Program):
    """A CUDA graph over memory of its own."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self._inputs = map_tensors(torch.clone, inputs)
        self._graph = torch.cuda.CUDAGraph()
        with torch.no_grad():
            aside, now = torch.cuda.Stream(), torch.cuda.current_stream()
            aside.wait_stream(now)
            with torch.cuda.stream(aside):  # what libraries allocate at first must not be part of the graph
                for _ in range(3):
                    call_model(model, self._inputs)
            now.wait_stream(aside)
            try:
                with torch.cuda.graph(self._graph):
                    self._output = call_model(model, self._inputs)
            except RuntimeError as error:
                raise EngineError(
                    f"{type(model).__name__} cannot be recorded as a CUDA graph: {first_line(error)}"
                ) from error

    def run(self, inputs: Any) -> Any:
        for own, given in zip(tensors_of(self._inputs), tensors_of(inputs), strict=True):
            if own.shape != given.shape:
                raise EngineError(f"a CUDA graph recorded for {list(own.shape)} cannot take {list(given.shape)}")
            own.copy_(given)
        self._graph.replay()
        torch.cuda.synchronize()
        return self._output


def device_of(model: nn.Module) -> torch.device:
    """The first device of the model that is not the CPU; else the CPU."""
    tensors = (*model.parameters(), *model.buffers())
    return next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), torch.device("cpu"))


def _last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _with_code_of_its_own(function: F) -> F:
    """The compiler keeps at most eight programs per code object, and then runs the ninth model uncompiled, silently."""
    twin = types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    twin.__kwdefaults__, twin.__defaults__ = function.__kwdefaults__, function.__defaults__
    return twin  # type: ignore[return-value]
