"""Copies of modules are those that `copy.deepcopy` makes, whatever the module says about copying itself."""

from __future__ import annotations

import collections
import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lightning_prune.model_state.copying import copied


class OwnDeepCopy(nn.Linear):
    def __deepcopy__(self, memo):
        return self


class InstanceDeepCopy(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        vars(self)["__deepcopy__"] = lambda memo: self


class OwnState(nn.Linear):
    def __getstate__(self):
        return {**vars(self), "told": "by getstate"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.restored = True


class OwnReduce(nn.Linear):
    def __reduce__(self):
        return OwnReduce, (self.in_features, 7)


class NewArguments(nn.Linear):
    def __new__(cls, *args):
        made = super().__new__(cls)
        vars(made)["made"] = args
        return made

    def __getnewargs__(self):
        return ("again",)


class Shares(nn.Module):
    """Containers and modules under several names, a way back up, keys that are objects."""

    def __init__(self):
        super().__init__()
        self.first = self.second = nn.Conv2d(2, 2, 1)
        self.twin = copy.copy(self.first)  # which holds the same dictionaries
        self.names = self.same = ["a", {"b": (1, [2])}]
        self.up, self.view = [self], torch.arange(4.0)
        self.register_buffer("part", self.view[:2])
        self.by_module = {self.first: collections.OrderedDict(x={1, 2}), (1, 2): collections.Counter("aab")}
        self.first.register_forward_hook(self.hook)

    def hook(self, module, args, output):
        return output + 1


def lstm() -> nn.Module:
    return nn.LSTM(2, 3, num_layers=2)


MODELS = {
    "own deepcopy": lambda: nn.Sequential(OwnDeepCopy(2, 2)),
    "deepcopy of an instance": lambda: nn.Sequential(InstanceDeepCopy(2, 2)),
    "own state": lambda: nn.Sequential(OwnState(2, 2)),
    "own reduce": lambda: nn.Sequential(OwnReduce(2, 2)),
    "arguments of new": lambda: nn.Sequential(NewArguments(2, 2)),
    "shares": Shares,
    "attention": lambda: nn.TransformerEncoderLayer(8, 2, 8),
    "recurrent": lstm,
    "parametrized": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 2))),
    "spectral": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4))),
    "traced": lambda: nn.Sequential(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))),
    "lists": lambda: nn.ModuleDict({"a": nn.ModuleList([nn.Linear(1, 1)]), "b": nn.ParameterList([torch.ones(2)])}),
}


def shape_of(item, seen: dict[int, tuple]):
    """What an object is made of, as nested tuples in which an object met again is only its number."""
    if isinstance(item, (type(None), bool, int, float, str, torch.dtype, torch.device)):
        return item
    if id(item) in seen:
        return seen[id(item)][0]
    seen[id(item)] = len(seen), item  # the object too, or its id would be free again
    kind, inside = type(item).__qualname__, []
    if isinstance(item, Tensor):
        inside = [item.tolist(), item.requires_grad, item.stride()]
    elif isinstance(item, dict):
        inside = [(shape_of(key, seen), shape_of(value, seen)) for key, value in item.items()]
    elif isinstance(item, (list, tuple)):
        inside = [shape_of(part, seen) for part in item]
    if isinstance(item, nn.Module) and not isinstance(item, torch.jit.ScriptModule):
        inside = [(name, shape_of(value, seen)) for name, value in vars(item).items()]
    return kind, inside, shape_of(getattr(item, "__self__", None), seen)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings(r"ignore:`torch\.jit")
def test_a_copy_is_what_deepcopy_makes(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    torch.manual_seed(1)
    found = copied(model)
    torch.manual_seed(1)  # of a layer that is built anew
    expected = copy.deepcopy(model)
    assert shape_of(found, {}) == shape_of(expected, {})
    own = {id(module) for module in model.modules()}
    shared = [[other for other, module in of.named_modules() if id(module) in own] for of in (found, expected)]
    assert shared[0] == shared[1]
    assert not {id(p) for p in found.parameters()} & {id(p) for p in model.parameters()} or shared[0]
