"""Engines that run ONNX files: ONNX Runtime, OpenVINO, TensorRT; all in float32 unless told otherwise."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_prune.engines.base import OnnxEngine, Program, need, tensors_of
from lightning_prune.errors import EngineError, check_choice, first_line

Device = Literal["cpu", "cuda"]
Precision = Literal["f32", "f16", "bf16"]


class OnnxRuntime(OnnxEngine):
    """ONNX Runtime, on the CPU or on a GPU of NVIDIA.

    Args:
        device: ``cpu``, or ``cuda`` where ``onnxruntime-gpu`` is installed.
    """

    name = "onnxruntime"
    packages = ("onnxruntime", "onnxruntime-gpu")

    def __init__(self, device: Device = "cpu") -> None:
        check_choice("device", device, Device, EngineError)
        self._device = device

    @property
    def device(self) -> str:  # noqa: D102
        return self._device

    def check(self) -> None:  # noqa: D102
        need(self.name, ("onnx", "onnxscript", "onnxruntime"), "export")
        import onnxruntime

        if self._device == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise EngineError(
                f"ONNX Runtime {onnxruntime.__version__} cannot use a GPU here: pip install onnxruntime-gpu in place "
                "of onnxruntime"
            )

    def load(self, onnx: bytes) -> Program:
        """See `OnnxEngine.load`."""
        self.check()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors; warnings are about graph cleaning
        # threads of one session that wait busily would take the cores from the next one that is timed in turns
        options.add_session_config_entry("session.force_spinning_stop", "1")
        providers = {"cpu": ["CPUExecutionProvider"], "cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"]}
        try:
            session = onnxruntime.InferenceSession(onnx, options, providers=providers[self._device])
        except Exception as error:
            raise EngineError(f"ONNX Runtime refuses the file: {first_line(error)}") from error
        names = [entry.name for entry in session.get_inputs()]
        return _OnNumpy(names, lambda given: session.run(None, given))

    def __repr__(self) -> str:
        return f"OnnxRuntime({self._device!r})"


class OpenVINO(OnnxEngine):
    """OpenVINO, on the CPU.

    Args:
        precision: ``f32``; or ``bf16`` or ``f16`` where the CPU computes in it, which changes the outputs. OpenVINO
            by itself takes ``bf16`` wherever the CPU has it.
    """

    name = "openvino"
    packages = ("openvino",)

    def __init__(self, precision: Precision = "f32") -> None:
        check_choice("precision", precision, Precision, EngineError)
        self.precision = precision

    @property
    def device(self) -> str:  # noqa: D102
        return "cpu"

    def check(self) -> None:  # noqa: D102
        need(self.name, ("openvino", "onnx", "onnxscript"), "openvino")

    def load(self, onnx: bytes) -> Program:
        """See `OnnxEngine.load`."""
        self.check()
        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": self.precision,
        }
        try:
            compiled = _core().compile_model(_core().read_model(onnx), "CPU", settings)
        except Exception as error:
            raise EngineError(f"OpenVINO refuses the file: {first_line(error)}") from error
        request = compiled.create_infer_request()
        names = [entry.get_any_name() for entry in compiled.inputs]
        return _OnNumpy(names, lambda given: list(request.infer(given, share_inputs=True).values()))

    def __repr__(self) -> str:
        return f"OpenVINO({self.precision!r})"


class TensorRT(OnnxEngine):
    """TensorRT 10 or newer, on a GPU of NVIDIA.

    Args:
        precision: ``f32`` (tensor cores in TF32 as TensorRT likes), or ``f16`` or ``bf16``, which change the outputs.
    """

    name = "tensorrt"
    packages = ("tensorrt",)

    def __init__(self, precision: Precision = "f32") -> None:
        check_choice("precision", precision, Precision, EngineError)
        self.precision = precision

    @property
    def device(self) -> str:  # noqa: D102
        return "cuda"

    def check(self) -> None:  # noqa: D102
        need(self.name, ("tensorrt", "onnx", "onnxscript"), "tensorrt")
        if not torch.cuda.is_available():
            raise EngineError("the engine 'tensorrt' needs a GPU of NVIDIA, and torch sees none")

    def load(self, onnx: bytes) -> Program:
        """See `OnnxEngine.load`."""
        self.check()
        import tensorrt

        logger = tensorrt.Logger(tensorrt.Logger.ERROR)
        builder = tensorrt.Builder(logger)
        network = builder.create_network(0)
        parser = tensorrt.OnnxParser(network, logger)
        if not parser.parse(onnx):
            raise EngineError(f"TensorRT refuses the file: {parser.get_error(0).desc()}")
        config = builder.create_builder_config()
        if self.precision != "f32":
            config.set_flag({"f16": tensorrt.BuilderFlag.FP16, "bf16": tensorrt.BuilderFlag.BF16}[self.precision])
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise EngineError("TensorRT cannot build an engine of the file")
        return _OnTensorRT(tensorrt, tensorrt.Runtime(logger).deserialize_cuda_engine(plan))

    def __repr__(self) -> str:
        return f"TensorRT({self.precision!r})"


@functools.cache
def _core() -> Any:
    """One for the whole process: a core that goes unloads its plugins, whose threads may still be running."""
    import openvino

    return openvino.Core()


class _OnNumpy(Program):
    """Arrays by name in, a list of arrays out."""

    def __init__(self, names: list[str], call: Callable[[dict[str, Any]], list[Any]]) -> None:
        self._names, self._call = names, call

    def run(self, inputs: Any) -> list[Tensor]:
        given = [tensor.detach().cpu().numpy() for tensor in tensors_of(inputs)]
        return [torch.from_numpy(output) for output in self._call(dict(zip(self._names, given, strict=True)))]


class _OnTensorRT(Program):
    """Tensors on the GPU, allocated once."""

    def __init__(self, tensorrt: Any, engine: Any) -> None:
        self._engine = engine  # the context does not keep it alive
        self._context = engine.create_execution_context()
        self._inputs: list[Tensor] = []
        self._outputs: list[Tensor] = []
        self._stream = torch.cuda.Stream()
        dtypes = {
            tensorrt.float32: torch.float32,
            tensorrt.float16: torch.float16,
            tensorrt.bfloat16: torch.bfloat16,
            tensorrt.int32: torch.int32,
            tensorrt.int64: torch.int64,
            tensorrt.bool: torch.bool,
        }
        for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
            given = engine.get_tensor_mode(name) == tensorrt.TensorIOMode.INPUT
            shape, dtype = tuple(engine.get_tensor_shape(name)), dtypes[engine.get_tensor_dtype(name)]
            tensor = torch.empty(shape, dtype=dtype, device="cuda")
            self._context.set_tensor_address(name, tensor.data_ptr())
            (self._inputs if given else self._outputs).append(tensor)

    def run(self, inputs: Any) -> list[Tensor]:
        with torch.cuda.stream(self._stream):
            for own, given in zip(self._inputs, tensors_of(inputs), strict=True):
                own.copy_(given)
            if not self._context.execute_async_v3(self._stream.cuda_stream):
                raise EngineError("TensorRT failed to run the model")
        self._stream.synchronize()
        return self._outputs
