"""Making a latency table of a model's layers on an engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.engines import Engine, OnnxEngine, Program, engine_from
from lightning_prune.engines.torch_engines import device_of
from lightning_prune.errors import TableError
from lightning_prune.graph import ChannelGraph
from lightning_prune.measure.latency import thread_count
from lightning_prune.measure.latency_table import LatencyTable
from lightning_prune.measure.layer_calls import LayerKind, layer_calls
from lightning_prune.measure.portable.layer_files import context_file, context_key, layer_file
from lightning_prune.measure.portable.machine import this_machine
from lightning_prune.measure.portable.making import Layer, Maker, Preparer
from lightning_prune.measure.portable.table_data import table_data

Run = Callable[[], object]


def make_table(
    model: nn.Module,
    example_inputs: Any,
    *,
    engine: str | Engine,
    threads: int | None = None,
    graph: ChannelGraph | None = None,
    coarse: bool | None = None,
    progress: Callable[[int, int], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> LatencyTable:
    """Time every layer of a model over its widths; minutes, in which the machine should do nothing else.

    Every kind of layer is prepared alone, up to the most channels that the model has of it, and all take turns. Steps
    (lanes, alignment) are found by timing 33 neighbouring widths. Engines that run ONNX files get each layer in the
    surroundings of a network, whose time is subtracted; engines of torch get modules.

    Args:
        model: dense; left as it is.
        example_inputs: batch and image size that the table will hold for.
        engine: a name, or an engine of your own.
        threads: of the CPU; None: as torch is set.
        graph: of the model; channels that can never go are then not varied.
        coarse: fewer points; None: where preparing a layer takes long, as in ``compile`` and ``tensorrt``.
        progress: called with the points that are done, and their number.
        clock: seconds.

    Raises:
        EngineError: the engine is not installed or cannot run a layer.
        TableError: the model has no layers.
        TraceError: the model does not run on the inputs.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> table = make_table(net, torch.zeros(1, 3, 8, 8), engine="eager", coarse=True)
        >>> for kind in table.layers:
        ...     print(kind, table.time(kind, [2, 3], 4).shape)
        3x3 conv at 8x8 relu (2,)
        1x1 conv at 6x6 (2,)
    """
    engine = engine_from(engine)
    layers = layers_of(model, example_inputs, graph)
    device = device_of(model)
    preparer: Preparer = _OfFiles(engine) if isinstance(engine, OnnxEngine) else _OfModules(engine, device)
    with thread_count(threads) as running:
        made = Maker(preparer, progress=progress, clock=clock).make(layers, coarse)
    machine = this_machine(gpu="cuda" in (engine.device, device.type))
    data = table_data(made, engine.name, repr(engine), machine, running, engine.versions)
    return LatencyTable.of(data)


def layers_of(model: nn.Module, example_inputs: Any, graph: ChannelGraph | None = None) -> list[Layer]:
    """The kinds of layers that a model has, with their largest widths.

    Raises:
        TableError: the model has none.
        PlanError: the graph belongs to another model.
    """
    calls = layer_calls(model, example_inputs)
    if not calls:
        raise TableError(f"{type(model).__name__} has no convolution and no linear layer to time")
    varied = None
    if graph is not None:
        graph.check(model)
        varied = {(part.tensor, part.dim) for group in graph.groups if group.prunable for part in group.slices}
    found: dict[LayerKind, Layer] = {}
    for call in calls:
        kind, fixed = call.kind, (False, False)
        if varied is not None:
            of_output = 1 if kind.operator == "conv_transpose" else 0
            fixed = (call.weight, 1 - of_output) not in varied, (call.weight, of_output) not in varied
            if kind.groups != 1:
                fixed = (all(fixed), all(fixed))
        known = found.get(kind)
        if known is None:
            found[kind] = Layer(kind, call.channels, fixed)
            continue
        largest = tuple(map(max, known.largest, call.channels))
        same = [known.largest[dim] == call.channels[dim] and known.fixed[dim] and fixed[dim] for dim in (0, 1)]
        found[kind] = Layer(kind, (largest[0], largest[1]), (same[0], same[1]))
    return list(found.values())


class _OfFiles(Preparer):
    """Layers as ONNX files."""

    def __init__(self, engine: OnnxEngine) -> None:
        self._engine = engine

    def layer(self, kind: Any, channels: tuple[int, int]) -> Run:
        return self._load(*layer_file(kind, channels))

    def context(self, kind: Any, channels_in: int) -> Run:
        return self._load(*context_file(kind, channels_in))

    def context_key(self, kind: Any, channels_in: int) -> tuple[Any, ...]:
        return context_key(kind, channels_in)

    def _load(self, content: bytes, shapes: dict[str, tuple[int, ...]]) -> Run:
        program = self._engine.load(content)
        inputs = tuple(torch.randn(shape) for shape in shapes.values())
        return lambda: program.run(inputs)


class _OfModules(Preparer):
    """Layers as modules; what calling a program costs is subtracted."""

    def __init__(self, engine: Engine, device: torch.device) -> None:
        self._engine, self._device = engine, device

    def layer(self, kind: Any, channels: tuple[int, int]) -> Run:
        rows = (kind.size[0], channels[0]) if kind.operator == "linear" else (kind.batch, channels[0], *kind.size)
        return self._prepare(_module(kind, channels), torch.randn(rows))

    def context(self, kind: Any, channels_in: int) -> Run:  # noqa: ARG002
        return self._prepare(nn.ReLU(), torch.zeros(1, 1, 1, 1))

    def context_key(self, kind: Any, channels_in: int) -> tuple[Any, ...]:  # noqa: ARG002
        return ()

    def _prepare(self, module: nn.Module, x: Tensor) -> Run:
        x = x.to(self._device)
        program: Program = self._engine.prepare(module.to(self._device).eval(), x)
        return lambda: program.run(x)


_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "hardtanh": nn.ReLU6,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "elu": nn.ELU,
    "mish": nn.Mish,
    "prelu": nn.PReLU,
}


def _module(kind: LayerKind, channels: tuple[int, int]) -> nn.Module:
    """A layer with its norm and activation."""
    parts: list[nn.Module] = []
    dims = len(kind.size)
    if kind.operator == "linear":
        parts.append(nn.Linear(*channels))
        dims = 1
    else:
        transposed = kind.operator == "conv_transpose"
        layer = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
        settings: dict[str, Any] = {"output_padding": kind.padding[dims:]} if transposed else {}
        settings |= {"stride": kind.stride, "padding": kind.padding[:dims], "dilation": kind.dilation}
        parts.append(layer(*channels, kind.kernel, groups=kind.groups or channels[0], bias=not kind.norm, **settings))
    if kind.norm:
        parts.append(getattr(nn, f"BatchNorm{dims}d")(channels[1]))
    if kind.activation is not None:
        parts.append(_ACTIVATIONS[kind.activation]())
    return nn.Sequential(*parts)
