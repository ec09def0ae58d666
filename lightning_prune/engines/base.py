"""What an engine is: it prepares a model once, and runs it as often as asked."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_prune.errors import EngineError


class Program(ABC):
    """A model that an engine has prepared."""

    @abstractmethod
    def run(self, inputs: Any) -> Any:
        """One forward pass, done when it returns.

        Args:
            inputs: of the form and shapes that the model was prepared for.

        Returns:
            The outputs, in the form that the engine gives them: torch's as the model does, others as a list.
        """


class Engine(ABC):
    """What runs a model: eager PyTorch, a compiler, ONNX Runtime, ...; one of your own is a subclass.

    Attributes:
        name: by which commands, tables and files know it.
        packages: whose versions the time depends on, as the registry calls them.

    Example:
        >>> import torch
        >>> class Reversed(Engine):
        ...     name = "reversed"
        ...     def prepare(self, model, example_inputs):
        ...         class Backwards(Program):
        ...             def run(self, inputs):
        ...                 return model(inputs.flip(-1))
        ...         return Backwards()
        >>> Reversed().prepare(nn.Identity(), torch.zeros(2)).run(torch.tensor([1.0, 2.0]))
        tensor([2., 1.])
    """

    name: str
    packages: ClassVar[tuple[str, ...]] = ("torch",)

    @abstractmethod
    def prepare(self, model: nn.Module, example_inputs: Any) -> Program:
        """Do once what need not be done in every pass.

        Args:
            model: in eval mode; left as it is. Its device is where engines of torch run it.
            example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.

        Raises:
            EngineError: the engine is not installed, lacks its device, or cannot run this model.
        """

    @property
    def versions(self) -> dict[str, str]:
        """Of the packages that are installed."""
        return {name: version for name in self.packages if (version := version_of(name)) is not None}

    @property
    def device(self) -> str | None:
        """``cpu`` or ``cuda`` if the engine has chosen one; None: the model's."""
        return None

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class OnnxEngine(Engine):
    """An engine that runs ONNX files."""

    @abstractmethod
    def load(self, onnx: bytes) -> Program:
        """A file's content as a program; with as many threads of the CPU as torch has now.

        Raises:
            EngineError: the engine is not installed, lacks its device, or refuses the file.
        """

    def prepare(self, model: nn.Module, example_inputs: Any) -> Program:
        """Write the model as ONNX, in memory, and load it; see `Engine.prepare`."""
        from lightning_prune.engines.onnx_file import onnx_bytes

        self.check()
        return self.load(onnx_bytes(model, example_inputs))

    @abstractmethod
    def check(self) -> None:
        """Refuse to work where the engine or its device is missing.

        Raises:
            EngineError: with the line that installs it.
        """


def need(engine: str, modules: Iterable[str], extra: str) -> None:
    """Refuse an engine some modules of which are missing, and name the extra of pyproject.toml that brings them."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise EngineError(f"the engine {engine!r} needs {', '.join(missing)}: {install_line(extra)}")


def install_line(extra: str) -> str:
    """The command that brings an extra of this package."""
    return f'pip install "lightning-prune[{extra}]"'


def tensors_of(inputs: Any) -> list[Tensor]:
    """The tensors among a model's inputs, in the order of a file's inputs."""
    return [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]


def version_of(package: str) -> str | None:
    """None: not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
