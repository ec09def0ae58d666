"""The modules and parameters of a model, largest first: which were used, and whose code calls which."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

LISTS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)  # never run themselves


@dataclass(frozen=True)
class Part:
    """A module, or a parameter of a module that has others, with the names of all its tensors."""

    path: str
    module: nn.Module | None
    container: str
    tensors: tuple[str, ...]


class Parts:
    """Which parts of a model were used."""

    def __init__(
        self, model: nn.Module, names: Mapping[int, str], known: Collection[str], used: Collection[str]
    ) -> None:
        self.modules = dict(model.named_modules())
        self._used = used
        self._own = {
            path: {
                name: names[id(tensor)]
                for name, tensor in (*module._parameters.items(), *_statistics(module))
                if tensor is not None and names.get(id(tensor)) in known
            }
            for path, module in self.modules.items()
        }
        self._below: dict[str, list[str]] = {path: [] for path in self.modules}
        for path, own in self._own.items():
            parts = path.split(".") if path else []
            for length in range(len(parts) + 1):
                self._below[".".join(parts[:length])] += own.values()

    def reached(self, tensors: Collection[str]) -> bool:
        """Whether any of these tensors was used."""
        return any(tensor in self._used for tensor in tensors)

    def children(self, path: str) -> Iterator[Part]:
        """The modules and parameters right below a module."""
        for name, tensor in self._own[path].items():
            yield Part(_join(path, name), None, path, (tensor,))
        for name, child in self.modules[path].named_children():
            if (below := _join(path, name)) in self.modules and self._below[below]:
                yield Part(below, child, path, tuple(self._below[below]))

    def unreached(self, path: str) -> Iterator[Part]:
        """The largest parts none of whose tensors were used; lists are opened."""
        for part in self.children(path):
            if part.module is not None and (isinstance(part.module, LISTS) or self.reached(part.tensors)):
                yield from self.unreached(part.path)
            elif not self.reached(part.tensors):
                yield part

    def owner(self, part: Part) -> str:
        """The module whose code calls it: the innermost around it that is more than a list of modules."""
        path = part.container
        while isinstance(self.modules[path], (*LISTS, nn.Sequential)) and path:
            path = path.rpartition(".")[0]
        return path

    def siblings(self, owner: str, part: Part) -> Iterator[Part]:
        """Reached parts that the owner's code may call; lists, and what the part itself lies in, are opened."""
        for child in self.children(owner):
            if child.module is not None and (isinstance(child.module, LISTS) or part.path.startswith(f"{child.path}.")):
                yield from self.siblings(child.path, part)
            elif self.reached(child.tensors):
                yield child


def _statistics(module: nn.Module) -> list[tuple[str, Tensor | None]]:
    """Buffers that count as parameters: those of a norm."""
    return list(module._buffers.items()) if isinstance(module, _NormBase) else []


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
