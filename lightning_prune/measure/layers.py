"""Where the time of a forward pass goes, layer by layer, and what this machine could do at best; on the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_prune.errors import PruningError, TraceError
from lightning_prune.graph import call_model
from lightning_prune.measure.measurement import Latency, OperatorCounter, run_observed, summary
from lightning_prune.model_state.preservation import preserved

Bound = Literal["compute", "memory", "call"]


@dataclass(frozen=True)
class Machine:
    """What the CPU does at best, with the threads that torch has.

    Attributes:
        flops: floating-point operations per second, of a large matrix product.
        bandwidth: bytes per second, read and written, of copying more than the caches hold.
        call: seconds that the call of a layer takes which computes nothing to speak of: a rectifier on one number.
        product_call: the same for a layer with weights: a 1x1 convolution on one pixel.
        threads: of the CPU.
    """

    flops: float
    bandwidth: float
    call: float
    product_call: float
    threads: int

    @property
    def balance(self) -> float:
        """FLOPs per byte below which memory, not arithmetic, sets the pace."""
        return self.flops / self.bandwidth


@dataclass(frozen=True)
class LayerTime:
    """One leaf layer in a forward pass, all its calls together, on the whole input.

    Attributes:
        name: path of the module.
        kind: its class.
        channels: in and out, of convolutions and linear layers; else empty.
        calls: how often the pass runs it.
        flops: 2 x multiply-accumulates, and elements of biases, norms, activations and poolings as `count_flops` does.
        bytes: of inputs, outputs, parameters and buffers, each once per call.
        latency: with its spread over the passes.
    """

    name: str
    kind: str
    channels: tuple[int, ...]
    calls: int
    flops: int
    bytes: int
    latency: Latency

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes if self.bytes else 0.0

    def limits(self, machine: Machine) -> dict[Bound, float]:
        """Milliseconds that each of the machine's three limits alone asks for.

        ``compute`` is FLOPs over its FLOPs per second, ``memory`` bytes over its bandwidth, ``call`` what calling the
        layer costs at any size.
        """
        call = machine.product_call if self.channels else machine.call
        seconds: dict[Bound, float] = {
            "compute": self.flops / machine.flops,
            "memory": self.bytes / machine.bandwidth,
            "call": self.calls * call,
        }
        return {limit: 1e3 * value for limit, value in seconds.items()}

    def bound(self, machine: Machine) -> Bound:
        """The limit that asks for most.

        Between compute and memory that is the intensity against `Machine.balance`.
        """
        limits = self.limits(machine)
        return max(limits, key=lambda limit: limits[limit])

    def reach(self, machine: Machine) -> float:
        """The time that this limit asks for, relative to the time taken: 1 is as fast as the machine goes."""
        return max(self.limits(machine).values()) / self.latency.median


@dataclass(frozen=True)
class ModelTime:
    """A model's forward pass, taken apart. Nothing is subtracted anywhere.

    Attributes:
        layers: leaf layers in the order in which they first run.
        latency: of a pass without timers.
        timed: of a pass with timers around every layer.
    """

    layers: tuple[LayerTime, ...]
    latency: Latency
    timed: Latency

    @property
    def overhead(self) -> float:
        """What the timers add, relative to the pass without them just before; the median over these pairs."""
        pairs = zip(self.timed.samples, self.latency.samples, strict=True)
        return median(timed / plain for timed, plain in pairs) - 1

    @property
    def inside(self) -> float:
        """Milliseconds in layers."""
        return sum(layer.latency.median for layer in self.layers)

    @property
    def outside(self) -> float:
        """Milliseconds between the layers: additions, reshapes, functional calls, Python, the timers themselves."""
        spent = zip(*(layer.latency.samples for layer in self.layers), strict=True) if self.layers else ()
        left = [whole - sum(parts) for whole, parts in zip(self.timed.samples, spent, strict=False)]
        return max(0.0, median(left)) if left else self.timed.median

    @property
    def total(self) -> float:
        """Milliseconds inside and outside, of which shares are: medians of parts do not add up to that of the whole."""
        return self.inside + self.outside

    @property
    def flops(self) -> int:
        """Of all layers."""
        return sum(layer.flops for layer in self.layers)

    def share(self, *layers: LayerTime) -> float:
        """Of the total, spent in these layers."""
        return sum(layer.latency.median for layer in layers) / self.total


def time_layers(
    models: Mapping[str, tuple[nn.Module, Any]], *, warmup: int = 2, repeats: int = 10, threads: int | None = None
) -> dict[str, ModelTime]:
    """Time every leaf layer of several models; in turns, each pass with timers beside one without them.

    Args:
        models: {name: (model, example inputs)}, on the CPU.
        warmup: rounds before the clock runs.
        repeats: rounds timed.
        threads: of the CPU; None: as torch is set.

    Raises:
        PruningError: no repeats, or a model that is not on the CPU, where the host's clock says nothing of a layer.
        TraceError: a model does not run on its inputs.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> [(layer.name, layer.calls) for layer in time_layers({"": (net, torch.zeros(1, 3, 8, 8))})[""].layers]
        [('0', 1), ('1', 1)]
    """
    if warmup < 0 or repeats < 1:
        raise PruningError(f"warmup must be at least 0 and repeats at least 1, got {warmup} and {repeats}")
    for name, (model, _) in models.items():
        elsewhere = next((p.device for p in model.parameters() if p.device.type != "cpu"), None)
        if elsewhere is not None:
            raise PruningError(f"layers are timed on the CPU only, and model {name!r} is on {elsewhere}")
    counted = {name: _count(model, inputs) for name, (model, inputs) in models.items()}
    plain: dict[str, list[float]] = {name: [] for name in models}
    timed: dict[str, list[float]] = {name: [] for name in models}
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    with ExitStack() as stack:
        stack.enter_context(thread_count(threads))
        for model, _ in models.values():
            stack.enter_context(preserved(model))
            model.eval()
        for round_ in range(warmup + repeats):
            for name, (model, inputs) in models.items():
                if len(models) > 1:
                    _run(model, inputs)  # the model before has left the caches full of its own weights
                alone = _seconds(lambda: _run(model, inputs))  # noqa: B023
                with _timers(model, counted[name]) as spent:
                    together = _seconds(lambda: _run(model, inputs))  # noqa: B023
                if round_ >= warmup:
                    plain[name].append(1e3 * alone)
                    timed[name].append(1e3 * together)
                    samples[name].append(spent)
    return {
        name: ModelTime(
            tuple(
                LayerTime(*cost.facts(), summary([1e3 * spent.get(cost.name, 0.0) for spent in samples[name]]))
                for cost in counted[name].values()
            ),
            summary(plain[name]),
            summary(timed[name]),
        )
        for name in models
    }


def measure_machine(*, repeats: int = 7, threads: int | None = None) -> Machine:
    """Measure what this CPU does at best: a product of 1,024 x 1,024 matrices, and a copy of 128 MiB, in float32.

    The fastest of the repeats counts for the limits, the median for the calls. Write-allocation is not counted, so the
    bandwidth is that of useful bytes.

    Args:
        repeats: of each.
        threads: of the CPU; None: as torch is set.

    Example:
        >>> measure_machine(repeats=1).balance > 0
        True
    """
    size, count = 1024, 2**25
    left, right = torch.ones(size, size), torch.ones(size, size)
    product = torch.empty(size, size)
    source, target = torch.zeros(count), torch.empty(count)
    pixel, scalar = torch.zeros(1, 8, 1, 1), torch.zeros(1)
    convolution, rectifier = nn.Conv2d(8, 8, 1).eval(), nn.ReLU()
    with thread_count(threads), torch.no_grad():
        seconds = {
            name: [_seconds(run) for _ in range(many)]
            for name, many, run in (
                ("product", repeats + 1, lambda: torch.mm(left, right, out=product)),
                ("copy", repeats + 1, lambda: target.copy_(source)),
                ("call", 50 * repeats, lambda: rectifier(scalar)),
                ("product_call", 50 * repeats, lambda: convolution(pixel)),
            )
        }
        return Machine(
            2 * size**3 / min(seconds["product"]),
            2 * 4 * count / min(seconds["copy"]),
            median(seconds["call"]),
            median(seconds["product_call"]),
            torch.get_num_threads(),
        )


@contextmanager
def thread_count(threads: int | None) -> Iterator[int]:
    """So many threads of the CPU for a while, and how many that is; None leaves them as they are.

    Raises:
        PruningError: less than one.
    """
    if threads is not None and threads < 1:
        raise PruningError(f"threads must be at least 1, got {threads}")
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


@dataclass
class _Cost:
    """What one pass asks of a module."""

    name: str
    module: nn.Module
    calls: int = 0
    flops: int = 0
    bytes: int = 0
    calls_others: bool = False

    def facts(self) -> tuple[str, str, tuple[int, ...], int, int, int]:
        ends = (
            (getattr(self.module, f"in_{what}", None), getattr(self.module, f"out_{what}", None))
            for what in ("channels", "features")
        )
        channels = next(((a, b) for a, b in ends if isinstance(a, int) and isinstance(b, int)), ())
        return self.name, type(self.module).__name__, channels, self.calls, self.flops, self.bytes


def _count(model: nn.Module, inputs: Any) -> dict[nn.Module, _Cost]:
    """The modules that run and call no other, in the order in which they first run."""
    counter = OperatorCounter()
    names = {module: name or type(model).__name__ for name, module in model.named_modules()}
    costs: dict[nn.Module, _Cost] = {}
    running: list[tuple[_Cost, int]] = []

    def so_far() -> int:
        return 2 * counter.macs + counter.others

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        cost = costs.setdefault(module, _Cost(names[module], module))
        if running:
            running[-1][0].calls_others = True
        cost.bytes += _bytes((args, kwargs)) + _bytes([*module.parameters(), *module.buffers()])
        running.append((cost, so_far()))

    def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:  # noqa: ARG001
        cost, before = running.pop()
        cost.calls += 1
        cost.flops += so_far() - before
        cost.bytes += _bytes(output)

    with _hooks(model.modules(), begin, end):
        run_observed(model, inputs, counter)
    return {module: cost for module, cost in costs.items() if not cost.calls_others}


@contextmanager
def _timers(model: nn.Module, costs: Mapping[nn.Module, _Cost]) -> Iterator[dict[str, float]]:
    """Seconds spent in each module, by name, while inside."""
    spent: dict[str, float] = {}
    started: list[float] = []
    clock = time.perf_counter

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:  # noqa: ARG001
        started.append(clock())

    def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:  # noqa: ARG001
        seconds = clock() - started.pop()
        name = costs[module].name
        spent[name] = spent.get(name, 0.0) + seconds

    with _hooks((module for module in model.modules() if module in costs), begin, end):
        yield spent


@contextmanager
def _hooks(modules: Iterator[nn.Module], begin: Callable[..., None], end: Callable[..., None]) -> Iterator[None]:
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(begin, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(end, with_kwargs=True).remove)
        yield


def _bytes(value: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _run(model: nn.Module, inputs: Any) -> None:
    try:
        with torch.no_grad():
            call_model(model, inputs)
    except Exception as error:
        raise TraceError(f"the model does not run on the example inputs: {type(error).__name__}: {error}") from error


def _seconds(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
