"""ONNX files of a few operators, written byte by byte: no package is needed where they are made.

The wire format is that of https://protobuf.dev/programming-guides/encoding, the numbers of the fields those of
https://github.com/onnx/onnx/blob/main/onnx/onnx.proto3.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

IR_VERSION, OPSET = 8, 17  # ONNX Runtime 1.12 and newer
_FLOAT, _INT64 = 1, 7  # TensorProto.DataType
_ATTRIBUTE_FLOAT, _ATTRIBUTE_INT, _ATTRIBUTE_INTS = 1, 2, 7  # AttributeProto.AttributeType


def model(
    nodes: Iterable[bytes],
    weights: Mapping[str, np.ndarray],
    inputs: Mapping[str, Sequence[int]],
    outputs: Mapping[str, Sequence[int]],
) -> bytes:
    """A ModelProto: operators, their constants, and the shapes of inputs and outputs."""
    graph = b"".join(_field(1, each) for each in nodes) + _field(2, b"layer")
    graph += b"".join(_field(5, _tensor(name, value)) for name, value in weights.items())
    graph += b"".join(_field(11, _value(name, shape)) for name, shape in inputs.items())
    graph += b"".join(_field(12, _value(name, shape)) for name, shape in outputs.items())
    return _field(1, IR_VERSION) + _field(7, graph) + _field(8, _field(1, b"") + _field(2, OPSET))


def node(operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> bytes:
    """A NodeProto; attributes are floats, integers and lists of integers."""
    fields = [_field(1, name.encode()) for name in inputs]
    fields += [_field(2, output.encode()), _field(3, output.encode()), _field(4, operator.encode())]
    return b"".join(fields) + b"".join(_field(5, _attribute(name, value)) for name, value in attributes.items())


def _attribute(name: str, value: Any) -> bytes:
    if isinstance(value, float):
        return _field(1, name.encode()) + _key(2, 5) + struct.pack("<f", value) + _field(20, _ATTRIBUTE_FLOAT)
    if isinstance(value, int):
        return _field(1, name.encode()) + _field(3, value) + _field(20, _ATTRIBUTE_INT)
    return _field(1, name.encode()) + b"".join(_field(8, each) for each in value) + _field(20, _ATTRIBUTE_INTS)


def _tensor(name: str, value: np.ndarray) -> bytes:
    kind = _FLOAT if value.dtype == np.float32 else _INT64
    shape = b"".join(_field(1, size) for size in value.shape)
    return shape + _field(2, kind) + _field(8, name.encode()) + _field(9, value.tobytes())


def _value(name: str, shape: Sequence[int]) -> bytes:
    """A ValueInfoProto of floats."""
    dims = b"".join(_field(1, _field(1, size)) for size in shape)
    return _field(1, name.encode()) + _field(2, _field(1, _field(1, _FLOAT) + _field(2, dims)))


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _key(number, 0) + _varint(value)
    return _key(number, 2) + _varint(len(value)) + value


def _key(number: int, wire_type: int) -> bytes:
    return _varint(number << 3 | wire_type)


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers as their complement of two
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
