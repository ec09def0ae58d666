"""Which layers a forward pass runs, at what sizes, and what follows them: what a latency table is made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from lightning_prune.errors import PruningError
from lightning_prune.graph.running import map_tensors
from lightning_prune.measure.counting import OperatorObserver
from lightning_prune.measure.portable.layer_files import output_size
from lightning_prune.model_state.preservation import copy_without_values

Operator = Literal["conv", "conv_transpose", "linear"]
Activation = Literal[
    "relu", "leaky_relu", "hardtanh", "silu", "hardswish", "hardsigmoid", "sigmoid", "tanh", "gelu", "elu", "mish"
]
_BATCH_NORMS = frozenset("native_batch_norm _native_batch_norm_legit_no_training cudnn_batch_norm batch_norm".split())
_PRODUCTS = {"mm": 0, "mv": 0, "addmm": 1, "addmv": 1}  # where the first factor stands
_SAME = frozenset("view _unsafe_view squeeze alias detach".split())


@dataclass(frozen=True)
class LayerKind:
    """All of a layer's use but its channels: the key of a latency table.

    Attributes:
        operator: a convolution of any number of dimensions, a transposed one, or a linear layer.
        kernel: size; () for linear, as are stride, padding and dilation.
        stride: as torch has it.
        padding: as torch has it; for conv_transpose the output padding stands behind it.
        dilation: as torch has it.
        groups: of the dense model; 0 stands for depthwise: as many as channels in.
        size: of the input in space; of a linear layer (rows,), all samples together.
        batch: samples; 1 for linear.
        norm: a batch norm follows.
        activation: ATen name of the activation that follows.
    """

    operator: Operator
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    size: tuple[int, ...] = ()
    batch: int = 1
    norm: bool = False
    activation: str | None = None

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.kernel)), self.operator]
        if any(step != 1 for step in self.stride):
            parts.append("/" + ",".join(map(str, dict.fromkeys(self.stride))))
        if self.groups != 1:
            parts.append(f"in {self.groups} groups" if self.groups else "depthwise")
        return " ".join(filter(None, (*parts, f"at {'x'.join(map(str, self.size))}", self.activation)))


@dataclass(frozen=True)
class LayerCall:
    """One use of a weight in one forward pass.

    Attributes:
        weight: qualified name of the parameter, or of the buffer.
        kind: all else that its time depends on.
        channels: in and out, in the model as it is; in: of the whole input, not of one group.
    """

    weight: str
    kind: LayerKind
    channels: tuple[int, int]


def layer_calls(model: nn.Module, example_inputs: Any) -> list[LayerCall]:
    """The convolutions and linear layers of one forward pass in eval mode, functional ones too, in their order.

    A batch norm or an activation counts as following if it is the first operator that takes the layer's output.
    Products of two activations (attention) are no layers, nor is a recurrent network.

    Args:
        model: left as it is; run without values where its code looks at none, else for real.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.

    Raises:
        TraceError: the model is scripted, or does not run on the inputs.
        PruningError: a layer's weight is computed from other tensors at every call.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> for call in layer_calls(net, torch.zeros(1, 3, 16, 16)):
        ...     print(call.weight, call.channels, call.kind, call.kind.norm)
        0.weight (3, 8) 3x3 conv at 16x16 relu True
        3.weight (8, 4) 1x1 conv at 14x14 False
    """
    try:
        without_values = copy_without_values(model)
        inputs = map_tensors(lambda tensor: tensor.to("meta"), example_inputs)
        seen = _LayerObserver(without_values).watch(without_values, inputs)
    except PruningError:  # it cannot be copied, looks at values, or does not run at all
        seen = _LayerObserver(model).watch(model, example_inputs)
    if seen.refused is not None:
        raise PruningError(seen.refused)
    return seen.calls


class _LayerObserver(OperatorObserver):
    """Notes the layers, and follows their outputs to a norm and an activation."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        named = (*model.named_buffers(), *model.named_parameters())
        self._names = {tensor.untyped_storage()._cdata: name for name, tensor in named}
        self._computed = WeakIdKeyDictionary()  # what follows from these alone
        self._open = WeakIdKeyDictionary()  # {output that nothing has taken yet: number of its layer}
        self.calls: list[LayerCall] = []
        self.refused: str | None = None

    def observe(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::").removesuffix("_")
        taken = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        self._follow(name, taken, made)
        if name == "convolution":
            self._add(args[1], _convolution(*args), _widths(*args), made[0])
        elif name in _PRODUCTS:
            x, weight = args[_PRODUCTS[name] :][:2]
            if name in ("mv", "addmv"):  # of torch.nn.functional.linear on one row
                x, weight = weight.unsqueeze(0), x.t()
            if self._name(x) is None or self._name(weight) is not None:  # else it is a parameter times the input
                self._add(weight, LayerKind("linear", size=(x.shape[0],)), tuple(weight.shape), made[0])
        if taken and all(self._name(tensor) is not None or tensor in self._computed for tensor in taken):
            self._computed.update(dict.fromkeys(made, True))

    def _name(self, tensor: Tensor) -> str | None:
        return self._names.get(tensor.untyped_storage()._cdata)

    def _add(self, weight: Tensor, kind: LayerKind, channels: Any, output: Tensor) -> None:
        name = self._name(weight)
        if name is None:
            if kind.operator == "linear" and weight not in self._computed:
                return  # of two activations
            self.refused = (
                f"the weight of a layer, {kind} with {channels[0]} channels in and {channels[1]} out, is computed at "
                "every call: a latency table knows layers by their parameters; make it one first "
                "(torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.prune.remove)"
            )
            return
        self._open[output] = len(self.calls)
        self.calls.append(LayerCall(name, kind, channels))

    def _follow(self, name: str, taken: Iterable[Tensor], made: list[Tensor]) -> None:
        """Whether this operator belongs to the layer whose output it is the first to take."""
        tensors = list(taken)
        numbers = [(tensor, self._open.pop(tensor)) for tensor in tensors if tensor in self._open]
        if not numbers:
            return
        tensor, number = numbers[0]
        call = self.calls[number]
        kind = call.kind
        if tensor is not tensors[0] or not made:
            return
        if name in _BATCH_NORMS and not kind.norm:
            self.calls[number] = replace(call, kind=replace(kind, norm=True))
            self._open[made[0]] = number
        elif name in get_args(Activation) or name == "_prelu_kernel":
            self.calls[number] = replace(call, kind=replace(kind, activation=name.strip("_").removesuffix("_kernel")))
        elif kind.operator == "linear" and not kind.norm and (name in _SAME or self._is_bias(name, tensors)):
            self._open[made[0]] = number

    def _is_bias(self, name: str, tensors: list[Tensor]) -> bool:
        return name == "add" and len(tensors) == 2 and tensors[1].dim() == 1 and self._name(tensors[1]) is not None


def _convolution(x: Tensor, weight: Tensor, bias: Any, *settings: Any) -> LayerKind:  # noqa: ARG001
    stride, padding, dilation, transposed, output_padding, groups = settings
    depthwise = groups > 1 and groups == x.shape[1]
    return LayerKind(
        "conv_transpose" if transposed else "conv",
        tuple(weight.shape[2:]),
        tuple(stride),
        (*padding, *(output_padding if transposed else ())),
        tuple(dilation),
        0 if depthwise else groups,
        tuple(x.shape[2:]),
        x.shape[0],
    )


def _widths(x: Tensor, weight: Tensor, bias: Any, *settings: Any) -> tuple[int, int]:  # noqa: ARG001
    transposed, groups = settings[3], settings[5]
    return x.shape[1], weight.shape[1] * groups if transposed else weight.shape[0]


def macs(kind: LayerKind, channels: tuple[int, int]) -> int:
    """Multiply-accumulates of a layer of so many channels, the whole batch."""
    if kind.operator == "linear":
        return kind.size[0] * prod(channels)
    places = prod(kind.size if kind.operator == "conv_transpose" else output_size(kind))
    return kind.batch * places * prod(kind.kernel) * channels[1] * channels[0] // (kind.groups or channels[0])
