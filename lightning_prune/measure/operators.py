"""One forward pass, and what its ATen operators cost: functional calls are not missed."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary
from typing_extensions import Self

from lightning_prune.errors import TraceError
from lightning_prune.graph import call_model
from lightning_prune.graph.running import untouched

ACTIVATIONS = frozenset("relu leaky_relu elu hardtanh _prelu_kernel gelu".split())
POOLS = frozenset(
    "max_pool2d_with_indices max_pool2d avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d max_pool3d_with_indices "
    "avg_pool3d _adaptive_avg_pool3d adaptive_max_pool3d".split()
)
NORMS = frozenset(
    "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm "
    "miopen_batch_norm batch_norm native_group_norm".split()
)


def run(model: nn.Module, example_inputs: Any) -> None:
    """One forward pass.

    Raises:
        TraceError: the model does not run on the inputs.
    """
    try:
        call_model(model, example_inputs)
    except Exception as error:
        raise TraceError(f"the model does not run on the example inputs: {type(error).__name__}: {error}") from error


class Observer(TorchDispatchMode):
    """Shows `observe` every ATen operator that really runs, composite ones taken apart."""

    def watch(self, model: nn.Module, example_inputs: Any) -> Self:
        """One forward pass in eval mode; the model is left as it is.

        Raises:
            TraceError: the model does not run on the inputs.
        """
        with untouched(model):
            model.eval()
            with self:
                run(model, example_inputs)
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

    def observe(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Look at one operator, its arguments and its output."""
        raise NotImplementedError(f"{type(self).__name__}.observe")


class OperatorCounter(Observer):
    """Counts at the level of ATen operators, so that functional calls are not missed."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0
        self.others = 0
        self._products = WeakIdKeyDictionary()

    @property
    def flops(self) -> int:
        """Both together: 2 x ``macs``, and the others."""
        return 2 * self.macs + self.others

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
        elif name in NORMS:
            self.others += (1 if args[1] is None else 2) * args[0].numel()
        elif name in ACTIVATIONS:
            self.others += output.numel()
        elif name in POOLS or (name == "mean" and _is_global_pool(args)):
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
