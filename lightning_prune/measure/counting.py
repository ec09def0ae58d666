"""What one forward pass computes and holds, operator by operator, so that functional calls are not missed."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Mapping
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary
from typing_extensions import Self

from lightning_prune.errors import PruningError, TraceError, check_choice
from lightning_prune.graph import call_model
from lightning_prune.graph.model_checks import check_traceable
from lightning_prune.graph.running import map_tensors, untouched

Convention = Literal["macs", "flops2", "ptflops", "paper"]
ACTIVATIONS = frozenset("relu leaky_relu elu hardtanh _prelu_kernel gelu".split())
POOLS = frozenset(
    "max_pool2d_with_indices max_pool2d avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d max_pool3d_with_indices "
    "avg_pool3d _adaptive_avg_pool3d adaptive_max_pool3d".split()
)
NORMS = frozenset(
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm "
    "miopen_batch_norm batch_norm native_group_norm".split()
)


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
        return value

    return tree_map(resized, example_inputs, is_leaf=lambda value: isinstance(value, list))


def run(model: nn.Module, example_inputs: Any) -> None:
    """One forward pass; a `TraceError` where the model fails."""
    try:
        call_model(model, example_inputs)
    except Exception as error:
        raise TraceError(f"the model does not run on the example inputs: {type(error).__name__}: {error}") from error


class OperatorObserver(TorchDispatchMode, ABC):
    """Shows `observe` every ATen operator that really runs, composite ones taken apart."""

    def watch(self, model: nn.Module, example_inputs: Any) -> Self:
        """One forward pass in eval mode; the model is left as it is."""
        check_traceable(model)
        with untouched(model):
            model.eval()
            own = map_tensors(lambda tensor: tensor.detach().clone(), example_inputs)  # it may change them in place
            with self:
                run(model, own)
        return self

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

    @abstractmethod
    def observe(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Look at one operator, its arguments and its output."""


class OperatorCounter(OperatorObserver):
    """Multiply-accumulates, and what ptflops counts besides."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = self.others = 0
        self._products = WeakIdKeyDictionary()

    @property
    def flops(self) -> int:
        """Both together."""
        return 2 * self.macs + self.others

    def observe(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:  # noqa: ARG002, D102
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::").removesuffix("_")
        if name == "convolution":
            x, weight, bias, transposed = *args[:3], args[6]
            self.macs += (x if transposed else output).numel() * prod(weight.shape[1:])
            self.others += output.numel() if bias is not None else 0
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
        elif name in NORMS:
            self.others += (1 if args[1] is None else 2) * args[0].numel()
        elif name in ACTIVATIONS:
            self.others += output.numel()
        elif name in POOLS or (name == "mean" and _is_global_pool(args)):
            self.others += args[0].numel()

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


def count_params(model: nn.Module, *, trainable: bool = True) -> int:
    """Number of parameters; with ``trainable`` only those that require gradients, as the papers count."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def count_flops(model: nn.Module, example_inputs: Any, convention: Convention = "macs") -> int:
    r"""Count the operations of one sample's forward pass in eval mode, functional calls included.

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
    check_choice("convention", convention, Convention, PruningError)
    return flops_by_convention(model, example_inputs)[convention]


def flops_by_convention(model: nn.Module, example_inputs: Any) -> dict[str, int]:
    """`count_flops` under every convention, from one forward pass."""
    counter = OperatorCounter().watch(model, example_inputs)
    batch = samples_in(example_inputs) or 1
    macs, others = counter.macs // batch, counter.others // batch
    return {"macs": macs, "flops2": 2 * macs, "ptflops": macs + others, "paper": 2 * (macs + others)}


class _PeakMemory(OperatorObserver):
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


def measure_memory(model: nn.Module, example_inputs: Any) -> int:
    """Bytes of activations alive at once, at most, during a forward pass in eval mode.

    The input counts, parameters and buffers do not, nor does what a kernel allocates for itself.

    Raises:
        TraceError: the model does not run on the inputs.

    Example:
        >>> measure_memory(nn.Linear(4, 2, bias=False), torch.zeros(1, 4))  # 4 numbers in, 2 out
        24
    """
    return _PeakMemory(model).watch(model, example_inputs).peak


def state_size(model: nn.Module) -> int:
    """Bytes of the state dict as `torch.save` writes it."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell()
