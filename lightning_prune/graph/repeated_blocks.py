"""Which blocks of a model repeat another one: what its code makes of channels shows in the first of them.

A network of 24 equal blocks is compared with one of them left; where that fails, all of them run.
"""

from __future__ import annotations

from collections import Counter
from types import BuiltinFunctionType, FunctionType
from typing import Any

from torch import nn

from lightning_prune.graph.running import is_dropout
from lightning_prune.model_state.cut_history import HISTORY

PLAIN = (bool, int, float, str, bytes, type(None), type, FunctionType, BuiltinFunctionType)
NO_MATTER = frozenset(("training", "_parameters", "_buffers", "_modules", HISTORY))


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """{path: module} of blocks in lists and sequences that are built like an earlier one, settings included."""
    uses = Counter(id(child) for module in model.modules() for child in module._modules.values() if child is not None)
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if type(module) not in (nn.ModuleList, nn.Sequential) or any(f"{path}.".startswith(f"{one}.") for one in found):
            continue
        seen: list[Any] = []
        for name, child in module._modules.items():
            if child is None or not child._modules or not any(True for _ in child.parameters()):
                continue  # a single layer in a sequence leads from certain channels to certain others
            form = _form(child)
            if form not in seen:
                seen.append(form)
            elif all(uses[id(inner)] == 1 for inner in child.modules()):
                found[f"{path}.{name}" if path else name] = child
    return found


def _form(module: nn.Module) -> list[Any]:
    """Types, settings and shapes of a module and all inside it; what cannot be compared is its own."""
    return [(path, type(inner), _tensors(inner), _settings(inner)) for path, inner in module.named_modules()]


def _tensors(module: nn.Module) -> list[Any]:
    named = (*module._parameters.items(), *module._buffers.items())
    return [(name, tensor.shape, tensor.dtype) for name, tensor in named if tensor is not None]


def _settings(module: nn.Module) -> dict[str, Any]:
    if is_dropout(module):
        return {}  # how much it drops, which it does in training only
    return {name: _comparable(value) for name, value in vars(module).items() if name not in NO_MATTER}


def _comparable(value: Any) -> Any:
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, dict):
        return type(value), [(key, _comparable(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [_comparable(item) for item in value]
    return id(value) if not isinstance(value, (set, frozenset)) or value else type(value)
