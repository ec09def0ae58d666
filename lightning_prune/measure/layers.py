"""Where the time of a forward pass goes, layer by layer, held against what the machine does at best; on the CPU."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_prune.engines import Eager
from lightning_prune.errors import PruningError
from lightning_prune.measure.counting import OperatorCounter
from lightning_prune.measure.latency import Latency, Models, in_eval_mode, in_turns, timed_pass

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
        """The limit that asks for most; between compute and memory the intensity against `Machine.balance` tells."""
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
    def outside(self) -> float:
        """Milliseconds between the layers: additions, reshapes, functional calls, Python, the timers themselves."""
        parts = (layer.latency.samples for layer in self.layers)
        left = [whole - sum(spent) for whole, *spent in zip(self.timed.samples, *parts, strict=True)]
        return max(0.0, median(left))

    @property
    def total(self) -> float:
        """Milliseconds inside and outside, of which shares are: medians of parts do not add up to that of the whole."""
        return sum(layer.latency.median for layer in self.layers) + self.outside

    @property
    def flops(self) -> int:
        """Of all layers."""
        return sum(layer.flops for layer in self.layers)

    def share(self, *layers: LayerTime) -> float:
        """Of the total, spent in these layers."""
        return sum(layer.latency.median for layer in layers) / self.total


def time_layers(models: Models, *, repeats: int = 10) -> dict[str, ModelTime]:
    """Time every leaf layer of several models; in turns, each pass with timers beside one without them.

    Args:
        models: {name: (model, example inputs)}, on the CPU.
        repeats: rounds timed.

    Raises:
        PruningError: no repeats, or a model that is not on the CPU, where the host's clock says nothing of a layer.
        TraceError: a model does not run on its inputs.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> [(layer.name, layer.calls) for layer in time_layers({"": (net, torch.zeros(1, 3, 8, 8))})[""].layers]
        [('0', 1), ('1', 1)]
    """
    for name, (model, _) in models.items():
        elsewhere = next((p.device for p in model.parameters() if p.device.type != "cpu"), None)
        if elsewhere is not None:
            raise PruningError(f"layers are timed on the CPU only, and model {name!r} is on {elsewhere}")
    counted = {name: _count(model, inputs) for name, (model, inputs) in models.items()}

    def whole(name: str) -> float:
        model, inputs = models[name]
        return timed_pass(Eager().prepare(model, inputs), inputs)

    def timer(name: str) -> tuple[float, float, dict[nn.Module, float]]:
        plain = whole(name)
        with _timers(counted[name]) as spent:
            return plain, whole(name), spent

    found = {}
    with in_eval_mode(models):
        turns = in_turns(models, whole, timer, 2, repeats)
    for name, rounds in turns.items():
        plain, timed, spent = zip(*rounds, strict=True)
        layers = (
            layer_time(Latency.of([times.get(module, 0.0) for times in spent]))
            for module, layer_time in counted[name].items()
        )
        found[name] = ModelTime(tuple(layers), Latency.of(plain), Latency.of(timed))
    return found


def _count(model: nn.Module, inputs: Any) -> dict[nn.Module, Callable[[Latency], LayerTime]]:
    """The `LayerTime` but for the time, of modules that call no other, in the order in which they first run."""
    counter = OperatorCounter()
    calls: Counter[nn.Module] = Counter()
    flops: Counter[nn.Module] = Counter()
    moved: Counter[nn.Module] = Counter()
    running: list[nn.Module] = []
    callers: set[nn.Module] = set()

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:  # noqa: ARG001
        callers.update(running[-1:])
        running.append(module)
        flops[module] -= counter.flops

    def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        running.pop()
        calls[module] += 1
        flops[module] += counter.flops
        tensors = tree_leaves((args, kwargs, output, *module.parameters(), *module.buffers()))
        moved[module] += sum(leaf.numel() * leaf.element_size() for leaf in tensors if isinstance(leaf, Tensor))

    with _hooks(model.modules(), begin, end):
        counter.watch(model, inputs)
    names = {module: name or type(model).__name__ for name, module in model.named_modules()}
    return {
        layer: partial(
            LayerTime, names[layer], type(layer).__name__, _channels(layer), calls[layer], flops[layer], moved[layer]
        )
        for layer in flops
        if layer not in callers
    }


@contextmanager
def _timers(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, float]]:
    """Milliseconds spent in each module while inside."""
    spent: dict[nn.Module, float] = {}
    started: list[float] = []
    clock = time.perf_counter

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:  # noqa: ARG001
        started.append(clock())

    def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:  # noqa: ARG001
        milliseconds = 1e3 * (clock() - started.pop())
        spent[module] = spent.get(module, 0.0) + milliseconds

    with _hooks(modules, begin, end):
        yield spent


@contextmanager
def _hooks(modules: Iterable[nn.Module], begin: Callable[..., None], end: Callable[..., None]) -> Iterator[None]:
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(begin, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(end, with_kwargs=True).remove)
        yield


def _channels(layer: nn.Module) -> tuple[int, ...]:
    for what in ("channels", "features"):
        ends = getattr(layer, f"in_{what}", None), getattr(layer, f"out_{what}", None)
        if all(isinstance(end, int) for end in ends):
            return ends  # type: ignore[return-value]
    return ()


def measure_machine(*, repeats: int = 7) -> Machine:
    """Measure what this CPU does at best: a product of 1,024 x 1,024 matrices, and a copy of 128 MiB, in float32.

    The fastest of the repeats counts for the limits, the median for the calls. Write-allocation is not counted, so the
    bandwidth is that of useful bytes.

    Args:
        repeats: of each.

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
    with torch.no_grad():
        return Machine(
            flops=2 * size**3 / min(_seconds(lambda: torch.mm(left, right, out=product), repeats + 1)),
            bandwidth=2 * 4 * count / min(_seconds(lambda: target.copy_(source), repeats + 1)),
            call=median(_seconds(lambda: rectifier(scalar), 50 * repeats)),
            product_call=median(_seconds(lambda: convolution(pixel), 50 * repeats)),
            threads=torch.get_num_threads(),
        )


def _seconds(run: Callable[[], Any], times: int) -> list[float]:
    clock = [time.perf_counter()]
    for _ in range(times):
        run()
        clock.append(time.perf_counter())
    return [after - before for before, after in pairwise(clock)]
