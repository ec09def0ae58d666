"""Example inputs and outputs of any form."""

from __future__ import annotations

from collections import OrderedDict, UserDict, deque, namedtuple
from dataclasses import dataclass, fields
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.graph import as_args, call_model, on_device
from lightning_prune.graph.running import map_tensors, tensors_in


def test_example_inputs_become_arguments():
    x = torch.zeros(1)
    assert as_args(x) == ((x,), {})
    assert as_args((x, 2)) == ((x, 2), {})
    assert as_args([x, x]) == (([x, x],), {})
    assert as_args({"x": x}) == ((), {"x": x})
    assert as_args({0: x}) == (({0: x},), {})
    assert call_model(nn.Identity(), {"input": x}) is x


class AttrDict(OrderedDict):
    """A dict subclass whose values are attributes too, as in timm and transformers."""

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return self[name]


@dataclass
class ModelOutput(OrderedDict):
    """A dataclass and a dict at once: every value is held twice."""

    logits: torch.Tensor | None = None
    hidden: tuple | None = None

    def __post_init__(self):
        for field in fields(self):
            if getattr(self, field.name) is not None:
                OrderedDict.__setitem__(self, field.name, getattr(self, field.name))

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        object.__setattr__(self, key, value)


class Slotted:
    __slots__ = ("__hidden", "x")

    def __init__(self, x, hidden):
        self.x, self.__hidden = x, hidden

    def hidden(self):
        return self.__hidden


class Node:
    def __init__(self, x):
        self.x, self.next, self.text = x, self, ["no tensor", None, 3]


Pair = namedtuple("Pair", "first second")

OUTPUTS = {
    "attribute dict": lambda x, y: AttrDict(a=x, loss=None, b=y),
    "user dict": lambda x, y: UserDict(a=x, b={"c": y}),
    "model output": lambda x, y: ModelOutput(x, (y,)),
    "named tuple": lambda x, y: Pair(x, [Pair(y, None)]),
    "slots": lambda x, y: Slotted({"y": y}, x),
    "cycle": lambda x, y: [Node(x), Node(y)],
    "namespace": lambda x, y: SimpleNamespace(x=x, deep=SimpleNamespace(y=deque([y]))),
    "read-only": lambda x, y: MappingProxyType({"x": x, "y": (y, x)}),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_every_tensor_is_found_once_and_mapped_where_it_is(kind):
    x, y = torch.ones(2), torch.zeros(3)
    made = OUTPUTS[kind](x, y)
    assert [id(t) for t in tensors_in(made)] == [id(x), id(y)]
    doubled = map_tensors(lambda tensor: tensor.double(), made)
    assert [(t.dtype, len(t)) for t in tensors_in(doubled)] == [(torch.float64, 2), (torch.float64, 3)]
    assert [id(t) for t in tensors_in(made)] == [id(x), id(y)]  # the first one is as it was
    assert kind == "read-only" or type(doubled) is type(made)


def test_objects_without_tensors_are_not_copied():
    batch = {"names": (names := ["a"]), "size": (size := SimpleNamespace(h=3)), "x": torch.ones(1)}
    moved = on_device(batch, nn.Linear(1, 1).to("meta"))
    assert moved["names"] is names
    assert moved["size"] is size
    assert moved["x"].is_meta


def test_packed_sequences_keep_their_batch_sizes():
    packed = nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(1, 2)], enforce_sorted=False)
    mapped = map_tensors(lambda tensor: tensor.to("meta"), packed)
    assert mapped.data.is_meta
    assert not mapped.batch_sizes.is_meta


class Returns(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.wrap = wrap

    def forward(self, x):
        hidden = self.first(x)
        return self.wrap(self.second(hidden.relu()), hidden[:, :4])


@pytest.mark.parametrize("kind", OUTPUTS)
def test_channels_that_reach_an_output_of_any_kind_stay(kind):
    graph = lp.trace(Returns(OUTPUTS[kind]), torch.randn(2, 3, 8, 8))
    assert {g.name for g in graph.groups if g.reason == "reaches the model's output"} == {"first", "second"}
    result = lp.prune(Returns(lambda x, _: OUTPUTS[kind](x, torch.zeros(1))), torch.randn(2, 3, 8, 8))
    assert result.lossless.passed
    assert result.lossless.outputs in (2, 4, 6)  # at one size or several
    assert result.model.first.out_channels == 4


class TakesBatch(nn.Module):
    """Reads a batch of some class, not a tensor."""

    def __init__(self, take):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.take = take

    def forward(self, *args, **kwargs):
        x, scale = self.take(*args, **kwargs)
        return self.second(self.first(x).relu()) * scale


INPUTS = {
    "user dict": (lambda x, y: UserDict(image=x, scale=y), lambda image, scale: (image, scale)),
    "model output": (lambda x, y: ModelOutput(x, (y,)), lambda logits, hidden: (logits, hidden[0])),
    "object": (lambda x, y: SimpleNamespace(image=x, scale=y), lambda batch: (batch.image, batch.scale)),
    "slots": (Slotted, lambda batch: (batch.x, batch.hidden())),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_inputs_of_any_class_are_cast_with_the_model(kind):
    wrap, take = INPUTS[kind]
    batch = wrap(torch.randn(2, 3, 8, 8), torch.ones(1))
    result = lp.prune(TakesBatch(take), batch, criterion="lre", batches=[batch])
    assert (result.lossless.passed, result.lossless.dtype) == (True, "float64")


def test_torch_keeps_the_operators_that_foreach_ones_are_taken_apart_into() -> None:
    class Copies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.copy = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            torch._foreach_copy_([self.copy.weight], [self.conv.weight * 2])
            return self.copy(x)

    before = torch.ops.aten.copy_.default
    lp.trace(Copies(), torch.zeros(1, 3, 4, 4))
    assert torch.ops.aten.copy_.default is before  # else torch.compile takes it for another
