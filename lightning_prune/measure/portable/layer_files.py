"""One layer as an ONNX file, in the surroundings that it has in a network.

An engine keeps activations in a layout of its own between layers. A file of one layer alone would pay at both ends for
what a network pays once: several times the layer itself. So the layer's input is made by a cheap 1x1 convolution, and
all but one pixel of its output is dropped by a pooling; the same file without the layer tells what these take.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import onnx_bytes as onnx

FEEDING = 16  # channels from which the layer's input is made


def layer_file(kind: Any, channels: tuple[int, int], seed: int = 0) -> tuple[bytes, dict[str, tuple[int, ...]]]:
    """A layer of so many channels in and out, with what comes before and after; and the shapes of its inputs."""
    make = _Maker(seed)
    if kind.operator == "linear":
        make.input((kind.size[0], channels[0]))
        make.add("Gemm", weight=(channels[0], channels[1]), bias=channels[1])
        make.activate(kind.activation, (channels[1],))
        return make.file((kind.size[0], channels[1]))
    _feed(make, kind, channels[0])
    groups = kind.groups or channels[0]
    dims = len(kind.size)
    attributes: dict[str, Any] = {
        "kernel_shape": list(kind.kernel),
        "strides": list(kind.stride),
        "pads": list(kind.padding[:dims]) * 2,
        "dilations": list(kind.dilation),
        "group": groups,
    }
    if kind.operator == "conv_transpose":
        attributes["output_padding"] = list(kind.padding[dims:])
        shape = (channels[0], channels[1] // groups, *kind.kernel)
        make.add("ConvTranspose", weight=shape, bias=channels[1], **attributes)
    else:
        make.add("Conv", weight=(channels[1], channels[0] // groups, *kind.kernel), bias=channels[1], **attributes)
    make.activate(kind.activation, (channels[1], *[1] * dims))
    _drop(make, output_size(kind))
    return make.file((kind.batch, channels[1], *[1] * dims))


def context_file(kind: Any, channels_in: int) -> tuple[bytes, dict[str, tuple[int, ...]]]:
    """The same without the layer."""
    make = _Maker(0)
    if kind.operator == "linear":
        make.input((1, 1))
        make.add("Relu")
        return make.file((1, 1))
    _feed(make, kind, channels_in)
    _drop(make, kind.size)
    return make.file((kind.batch, channels_in, *[1] * len(kind.size)))


def context_key(kind: Any, channels_in: int) -> tuple[Any, ...]:
    """What the time of `context_file` depends on."""
    return ("linear",) if kind.operator == "linear" else (kind.batch, *kind.size, channels_in)


def output_size(kind: Any) -> tuple[int, ...]:
    """Of a convolution, in space.

    >>> from types import SimpleNamespace as Kind
    >>> output_size(Kind(operator="conv", size=(9, 9), kernel=(3, 3), stride=(2, 2), padding=(1, 1), dilation=(1, 1)))
    (5, 5)
    """
    sizes = []
    for i, size in enumerate(kind.size):
        reach, stride, padding = kind.dilation[i] * (kind.kernel[i] - 1), kind.stride[i], kind.padding[i]
        if kind.operator == "conv_transpose":
            sizes.append((size - 1) * stride - 2 * padding + reach + 1 + kind.padding[len(kind.size) + i])
        else:
            sizes.append((size + 2 * padding - reach - 1) // stride + 1)
    return tuple(sizes)


def bytes_of(kind: Any, channels: tuple[int, int]) -> int:
    """Of weights and activations, in float32: what a prepared file holds, roughly."""
    if kind.operator == "linear":
        return 4 * (channels[0] * channels[1] + kind.size[0] * sum(channels))
    weights = int(np.prod(kind.kernel)) * channels[1] * channels[0] // (kind.groups or channels[0])
    pixels = int(np.prod(kind.size)), int(np.prod(output_size(kind)))
    return 4 * (weights + kind.batch * (pixels[0] * (channels[0] + FEEDING) + pixels[1] * channels[1]))


def _feed(make: _Maker, kind: Any, channels_in: int) -> None:
    make.input((kind.batch, FEEDING, *kind.size))
    dims = len(kind.size)
    make.add("Conv", weight=(channels_in, FEEDING, *[1] * dims), kernel_shape=[1] * dims)
    make.add("Relu")


def _drop(make: _Maker, size: tuple[int, ...]) -> None:
    make.add("MaxPool", kernel_shape=[1] * len(size), strides=list(size))


class _Maker:
    """A chain of operators."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._nodes: list[bytes] = []
        self._weights: dict[str, np.ndarray] = {}
        self._inputs: dict[str, tuple[int, ...]] = {}
        self._last = "input"

    def input(self, shape: tuple[int, ...]) -> None:
        self._inputs = {"input": shape}

    def add(
        self, operator: str, weight: Any = None, bias: int = 0, others: tuple[str, ...] = (), **settings: Any
    ) -> None:
        inputs = [self._last, *others]
        if weight is not None:
            inputs.append(self._constant(self._random.standard_normal(weight, dtype=np.float32) * np.float32(0.05)))
        if bias:
            inputs.append(self._constant(np.full(bias, 0.1, np.float32)))
        self._last = f"v{len(self._nodes)}"
        self._nodes.append(onnx.node(operator, inputs, self._last, **settings))

    def activate(self, name: str | None, channel_shape: tuple[int, ...]) -> None:
        before = self._last
        if name == "hardtanh":
            self.add("Clip", others=(self._number(0.0), self._number(6.0)))
        elif name == "silu":
            self.add("Sigmoid")
            self.add("Mul", others=(before,))
        elif name == "mish":
            self.add("Softplus")
            self.add("Tanh")
            self.add("Mul", others=(before,))
        elif name == "gelu":
            self.add("Div", others=(self._number(2**0.5),))
            self.add("Erf")
            self.add("Add", others=(self._number(1.0),))
            self.add("Mul", others=(before,))
            self.add("Mul", others=(self._number(0.5),))
        elif name == "prelu":
            self.add("PRelu", others=(self._constant(np.full(channel_shape, 0.25, np.float32)),))
        elif name is not None:
            self.add(_OPERATORS[name])

    def file(self, shape: tuple[int, ...]) -> tuple[bytes, dict[str, tuple[int, ...]]]:
        return onnx.model(self._nodes, self._weights, self._inputs, {self._last: shape}), self._inputs

    def _number(self, value: float) -> str:
        return self._constant(np.full((), value, np.float32))

    def _constant(self, value: np.ndarray) -> str:
        name = f"w{len(self._weights)}"
        self._weights[name] = value
        return name


_OPERATORS = {
    "relu": "Relu",
    "leaky_relu": "LeakyRelu",
    "hardswish": "HardSwish",
    "hardsigmoid": "HardSigmoid",
    "sigmoid": "Sigmoid",
    "tanh": "Tanh",
    "elu": "Elu",
}
