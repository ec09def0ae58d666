"""What a model costs: parameters, FLOPs under named conventions, latency, memory, size on disk."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from lightning_prune.errors import PruningError, TraceError
from lightning_prune.graph import call_model
from lightning_prune.graph.recording import untouched
from lightning_prune.model_state.preservation import preserved

Convention = Literal["macs", "flops2", "ptflops", "paper"]


@dataclass(frozen=True)
class Latency:
    """Wall time of one forward pass in milliseconds.

    Attributes:
        median: over the repeats.
        iqr: distance of the quartiles, the spread.
        samples: every repeat.
    """

    median: float
    iqr: float
    samples: tuple[float, ...]


@dataclass(frozen=True)
class Measurement:
    """Cost of one model on one input.

    Attributes:
        params: trainable parameters.
        total_params: with frozen ones.
        macs: multiply-accumulates of convolutions and matrix products, per sample.
        flops: per sample, by convention name, see `count_flops`.
        latency: of one forward pass on the whole input, in eval mode.
        peak_memory_bytes: largest sum of activations alive at once in that pass.
        size_bytes: of the saved state dict.
    """

    params: int
    total_params: int
    macs: int
    flops: dict[str, int]
    latency: Latency
    peak_memory_bytes: int
    size_bytes: int


def measure(
    model: nn.Module, example_inputs: Any, *, warmup: int = 2, repeats: int = 10, threads: int | None = None
) -> Measurement:
    """Everything below in one go; the model is left as it is.

    Raises:
        TraceError: the model does not run on the inputs.

    Example:
        >>> measure(nn.Linear(4, 2), torch.zeros(1, 4)).macs
        8
    """
    counts = flops_by_convention(model, example_inputs)
    return Measurement(
        count_params(model),
        count_params(model, trainable=False),
        counts["macs"],
        counts,
        measure_latency(model, example_inputs, warmup=warmup, repeats=repeats, threads=threads),
        measure_memory(model, example_inputs),
        state_size(model),
    )


def count_params(model: nn.Module, *, trainable: bool = True) -> int:
    """Number of parameters; with ``trainable`` only those that require gradients, as the papers count."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def count_flops(model: nn.Module, example_inputs: Any, convention: Convention = "macs") -> int:
    r"""Operations of one sample's forward pass in eval mode, functional calls included.

    ``macs``
        multiply-accumulates of convolutions and matrix products, :math:`k^2 C_{in}/g \, C_{out} H W` (H, W of the
        input for transposed convolutions); no biases.
    ``flops2``
        2 x ``macs``.
    ``ptflops``
        as ptflops 0.6.9: ``macs``, plus output elements for a bias, 2 x elements for an affine batch, instance or
        group norm (1 x without affine), output elements of a ReLU-like activation, input elements of a pooling.
        Additions and resizing are free.
    ``paper``
        2 x ``ptflops``: what Lee et al., Sensors 23(4):2102, 2023, print as FLOPs.

    Samples are counted by the first dimension of the first tensor, or by the length of the list if that tensor lies
    in one, as images do for detection models. A model on the meta device is counted without computing anything.

    Raises:
        PruningError: unknown convention.
        TraceError: the model does not run on the inputs.

    Example:
        >>> count_flops(nn.Conv2d(3, 8, 3, padding=1), torch.zeros(2, 3, 4, 4), "ptflops")
        3584
    """
    if convention not in get_args(Convention):
        raise PruningError(f"convention must be one of {', '.join(get_args(Convention))}, got {convention!r}")
    return flops_by_convention(model, example_inputs)[convention]


def measure_latency(
    model: nn.Module, example_inputs: Any, *, warmup: int = 2, repeats: int = 10, threads: int | None = None
) -> Latency:
    """Time forward passes in eval mode without gradients.

    Args:
        model: left as it is.
        example_inputs: the whole of it is one pass.
        warmup: passes before the clock runs.
        repeats: passes timed.
        threads: of the CPU; None: as torch is set.
    """
    return compare_latency({"": (model, example_inputs)}, warmup=warmup, repeats=repeats, threads=threads)[""]


def compare_latency(
    models: Mapping[str, tuple[nn.Module, Any]],
    *,
    warmup: int = 2,
    repeats: int = 10,
    threads: int | None = None,
) -> dict[str, Latency]:
    """Time several models in turns, so that whatever else the machine does falls on all of them alike.

    Before each timed pass goes one that is not timed: the model before has left the caches full of its own weights,
    where a deployed model finds its own.

    Args:
        models: {name: (model, example inputs)}.
        warmup: rounds before the clock runs.
        repeats: rounds timed.
        threads: of the CPU; None: as torch is set.

    Raises:
        PruningError: no repeats, no threads, or a model on the meta device, which computes nothing.
        TraceError: a model does not run on its inputs.
    """
    if warmup < 0 or repeats < 1:
        raise PruningError(f"warmup must be at least 0 and repeats at least 1, got {warmup} and {repeats}")
    if threads is not None and threads < 1:
        raise PruningError(f"threads must be at least 1, got {threads}")
    for name, (model, _) in models.items():
        if any(p.is_meta for p in model.parameters()):
            raise PruningError(f"model {name!r} is on the meta device, where nothing is computed: no time to measure")
    samples: dict[str, list[float]] = {name: [] for name in models}
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with ExitStack() as stack:
            for model, _ in models.values():
                stack.enter_context(_evaluating(model))
            for round_ in range(warmup + repeats):
                for name, (model, inputs) in models.items():
                    if len(models) > 1:
                        _time_once(model, inputs)
                    seconds = _time_once(model, inputs)
                    if round_ >= warmup:
                        samples[name].append(seconds * 1e3)
    finally:
        torch.set_num_threads(before)
    return {name: summary(values) for name, values in samples.items()}


def measure_memory(model: nn.Module, example_inputs: Any) -> int:
    """Bytes of activations alive at once, at most, during a forward pass in eval mode.

    The input counts, parameters and buffers do not, nor does what a kernel allocates for itself.

    Raises:
        TraceError: the model does not run on the inputs.

    Example:
        >>> measure_memory(nn.Linear(4, 2, bias=False), torch.zeros(1, 4))  # 4 numbers in, 2 out
        24
    """
    mode = _PeakMemory(model)
    run_observed(model, example_inputs, mode)
    return mode.peak


def state_size(model: nn.Module) -> int:
    """Bytes of the state dict as `torch.save` writes it."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell()


def _time_once(model: nn.Module, inputs: Any) -> float:
    device = next((p.device for p in model.parameters() if p.device.type != "cpu"), None)
    with torch.no_grad():  # inference_mode would poison what a model caches for later, such as anchors
        if device is not None:
            torch.accelerator.synchronize(device)
        started = time.perf_counter()
        _call(model, inputs)
        if device is not None:
            torch.accelerator.synchronize(device)
        return time.perf_counter() - started


def summary(samples: list[float]) -> Latency:
    """Median and distance of the quartiles."""
    if len(samples) < 2:
        return Latency(statistics.median(samples), 0.0, tuple(samples))
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Latency(statistics.median(samples), high - low, tuple(samples))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    with preserved(model):
        model.eval()
        yield


def _call(model: nn.Module, example_inputs: Any) -> None:
    try:
        call_model(model, example_inputs)
    except Exception as error:
        raise TraceError(f"the model does not run on the example inputs: {type(error).__name__}: {error}") from error


def run_observed(model: nn.Module, example_inputs: Any, mode: TorchDispatchMode) -> None:
    """One forward pass in eval mode under a mode; the model is left as it is."""
    with untouched(model):
        model.eval()
        with mode:
            _call(model, example_inputs)


def samples_in(example_inputs: Any) -> int:
    """How many samples a forward pass on these inputs takes; 0 if nothing tells."""
    if isinstance(example_inputs, Tensor):
        return example_inputs.shape[0] if example_inputs.dim() else 0
    if isinstance(example_inputs, list) and any(isinstance(leaf, Tensor) for leaf in tree_leaves(example_inputs)):
        return len(example_inputs)
    if isinstance(example_inputs, Mapping):
        example_inputs = tuple(example_inputs.values())
    parts = example_inputs if isinstance(example_inputs, tuple) else ()
    return next((count for count in map(samples_in, parts) if count), 0)


def with_samples(example_inputs: Any, samples: int) -> Any:
    """The same inputs with another number of samples, repeated or left out; what is no batch stays as it is.

    Example:
        >>> with_samples((torch.zeros(2, 3), 0.5), 5)[0].shape
        torch.Size([5, 3])
    """
    before = samples_in(example_inputs)

    def resized(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() and len(value) == before:
            return value[torch.arange(samples, device=value.device) % before]
        if isinstance(value, list) and len(value) == before:
            return [value[number % before] for number in range(samples)]
        if isinstance(value, tuple):
            return tuple(map(resized, value))
        if isinstance(value, Mapping):
            return {key: resized(item) for key, item in value.items()}
        return value

    return resized(example_inputs)


def flops_by_convention(model: nn.Module, example_inputs: Any) -> dict[str, int]:
    """`count_flops` under every convention, from one forward pass."""
    mode = OperatorCounter()
    run_observed(model, example_inputs, mode)
    batch = samples_in(example_inputs) or 1
    macs, others = mode.macs // batch, mode.others // batch
    return {"macs": macs, "flops2": 2 * macs, "ptflops": macs + others, "paper": 2 * (macs + others)}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ACTIVATIONS = _names("relu leaky_relu elu hardtanh _prelu_kernel gelu")
_POOLS = _names(
    "max_pool2d_with_indices max_pool2d avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d max_pool3d_with_indices "
    "avg_pool3d _adaptive_avg_pool3d adaptive_max_pool3d"
)
_NORMS = _names(
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm "
    "miopen_batch_norm batch_norm native_group_norm"
)


class _Observer(TorchDispatchMode):
    """Shows every ATen operator that really runs, composite ones taken apart."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with self:  # under torch.inference_mode, linear and conv2d arrive whole
            output = func.decompose(*args, **kwargs)
        if output is NotImplemented:
            output = func(*args, **kwargs)
            self.observe(func, args, kwargs, output)
        return output

    def observe(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        raise NotImplementedError(f"{type(self).__name__}.observe")


class OperatorCounter(_Observer):
    """Counts at the level of ATen operators, so that functional calls are not missed."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0
        self.others = 0
        self._products = WeakIdKeyDictionary()

    def observe(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:  # noqa: ARG002
        """Add what one operator costs."""
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::").removesuffix("_")
        if name == "convolution":
            self._convolution(output, *args)
        elif name in ("mm", "bmm", "mv", "dot"):
            self.macs += output.numel() * args[0].shape[-1]
            self._products[output] = True
        elif name in ("view", "_unsafe_view") and args[0] in self._products:
            self._products[output] = True
        elif name == "add" and args[0] in self._products and isinstance(args[1], Tensor) and args[1].dim() == 1:
            self.others += output.numel()  # the bias of a linear layer on a permuted input
        elif name in ("mkldnn_rnn_layer", "_cudnn_rnn"):
            self._recurrent(*args)
        elif name in ("addmm", "baddbmm", "addmv"):
            self.macs += output.numel() * args[1].shape[-1]
            self.others += output.numel()
        elif name.startswith("_scaled_dot_product"):
            query, key, value = args[:3]
            self.macs += prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        elif name in _NORMS:
            self.others += (1 if args[1] is None else 2) * args[0].numel()
        elif name in _ACTIVATIONS:
            self.others += output.numel()
        elif name in _POOLS or (name == "mean" and _is_global_pool(args)):
            self.others += args[0].numel()

    def _convolution(self, output: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> None:
        transposed = rest[3]
        self.macs += (x if transposed else output).numel() * prod(weight.shape[1:])
        self.others += output.numel() if bias is not None else 0

    def _recurrent(self, x: Tensor, *weights: Any) -> None:
        """A fused recurrent layer: every weight matrix is used, every bias added, once per sample and time step."""
        steps = prod(x.shape[:-1])
        first = weights[0] if isinstance(weights[0], (list, tuple)) else weights[:4]
        self.macs += steps * sum(weight.numel() for weight in first if weight.dim() == 2)
        self.others += steps * sum(weight.numel() for weight in first if weight.dim() == 1)


def _is_global_pool(args: tuple[Any, ...]) -> bool:
    """AdaptiveAvgPool(1) arrives as a mean over the trailing positions."""
    rank = args[0].dim()
    dims = sorted(d % rank for d in args[1]) if len(args) > 1 and args[1] else []
    return rank > 3 and dims == list(range(2, rank))  # rank 3: the mean of a hand-written layer norm, for one


class _PeakMemory(_Observer):
    """Follows which activations are alive."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self._alive = WeakIdKeyDictionary()
        self.peak = 0

    def observe(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:  # noqa: ARG002
        for tensor in tree_leaves((args, kwargs, output)):
            if isinstance(tensor, Tensor):
                self._alive[tensor] = True
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in self._alive}
        self.peak = max(self.peak, sum(size for key, size in storages.items() if key not in self._own))
