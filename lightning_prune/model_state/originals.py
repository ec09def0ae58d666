"""What a model's own code does to its parameters and buffers while it is only looked at: undone afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_prune.model_state.dispatch import EagerMode
from lightning_prune.model_state.memory import set_data_
from lightning_prune.model_state.memory import storage_of as storage_of  # graph.assignments takes it from here
from lightning_prune.model_state.preservation import places_of, put_back

STATISTICS = ("running_mean", "running_var")  # some batch norms write to them though their schema does not say so


class Entry(NamedTuple):
    """One parameter or buffer at the start. ``data`` keeps its memory, whose address no other tensor gets then."""

    module: nn.Module
    path: str
    own: dict[str, Any]  # the module's ``_parameters`` or ``_buffers``
    name: str
    tensor: Tensor
    data: Tensor


class Originals:
    """Values of a model's tensors, each saved before the first write to it (copy on write), and its attributes."""

    def __init__(self, model: nn.Module) -> None:
        self.entries = [
            Entry(module, f"{path}.{name}" if path else name, own, name, tensor, tensor.data)
            for path, module in model.named_modules()
            for own in (module._parameters, module._buffers)
            for name, tensor in own.items()
            if tensor is not None
        ]
        self._by_storage: dict[int, list[Tensor]] = {}
        for entry in self.entries:
            self._by_storage.setdefault(storage_of(entry.data), []).append(entry.data)
        self._places = places_of(model)
        self._attributes = [(vars(module), dict(vars(module))) for module in model.modules()]
        self._saved: list[tuple[Tensor, Tensor]] = []

    def note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Save what an operator is about to write to."""
        for tensor in written_by(func, args, kwargs):
            for data in self._by_storage.pop(storage_of(tensor), ()):
                self._saved.append((data, data.clone()))

    def kept(self) -> list[tuple[dict[str, Any], str, Any]]:
        """Plain attributes that now have another value: (attributes of the module, name, value)."""
        return [
            (own, name, value)
            for own, before in self._attributes
            for name, value in own.items()
            if value is not before.get(name) and name not in ("_parameters", "_buffers", "_modules", "training")
        ]

    def restore(self) -> None:
        """Put back values, memory and the tensors that were replaced by others."""
        with torch.no_grad():
            for data, value in self._saved:
                data.copy_(value)
        self._saved.clear()
        for entry in self.entries:
            if not same_place(entry.tensor, entry.data):
                set_data_(entry.tensor, entry.data)
        put_back(self._places)
        for own, before in self._attributes:
            if len(own) != len(before) or any(own.get(name) is not value for name, value in before.items()):
                own.clear()
                own.update(before)


class WritesUndone(EagerMode):
    """Inside, a model may write to its parameters, buffers and attributes; on leaving they are as they were."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._originals = Originals(model)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._originals.note(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._originals.restore()


def same_place(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same elements of the same memory."""
    return storage_of(tensor) == storage_of(other) and _layout(tensor) == _layout(other)


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset()


def written_by(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors that an operator writes to."""
    for position, name in _written(func):
        value = args[position] if position < len(args) else kwargs.get(name)
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, Tensor):
                yield item


@cache
def _written(func: Any) -> tuple[tuple[int, str], ...]:
    """Position and name of the arguments that an operator writes to."""
    statistics = func.overloadpacket.__name__.endswith("batch_norm")
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(func._schema.arguments)
        if (argument.alias_info is not None and argument.alias_info.is_write)
        or (statistics and argument.name in STATISTICS)
    )
