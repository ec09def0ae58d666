"""What a rule may look at: one recorded operator with its arguments and their labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

from lightning_prune.graph.constraints import Place
from lightning_prune.graph.contraction import Call
from lightning_prune.graph.labels import Info, LabelSpace
from lightning_prune.graph.recording import Recorder


@dataclass
class Context:
    """One recorded operator."""

    space: LabelSpace
    recorder: Recorder
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    calls: list[Call]
    norms: list[tuple[str, Tensor]]

    @property
    def name(self) -> str:
        """The operator without namespace; in-place variants under the name of their plain twin."""
        return self.func.overloadpacket._qualified_op_name.split("::")[1].removesuffix("_")

    @property
    def where(self) -> str:
        """Operator and module path, for messages."""
        name = self.func.overloadpacket._qualified_op_name.replace("::", ".")
        return f"{name} at {self.recorder.module!r}" if self.recorder.module else name

    @property
    def place(self) -> Place:
        """Where it ran, for constraints."""
        return Place(tuple(reversed(self.recorder.module_stack)), self.recorder.kind, self.where)

    def info(self, value: Any) -> Info:
        """What is known of an argument."""
        return self.recorder.info(value) if isinstance(value, Tensor) else Info(uniform=True)

    def argument(self, name: str, default: Any = None) -> Any:
        """An argument by its name in the operator's schema."""
        position, fallback = _arguments(self.func).get(name, (len(self.args), None))
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default if fallback is None else fallback)

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor argument, lists opened."""
        for value in (*self.args, *self.kwargs.values()):
            for item in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(item, Tensor):
                    yield item

    def freeze_inputs(self, reason: str) -> Info:
        """Freeze every label that enters; the output has none."""
        data = False
        for tensor in self.tensors():
            info = self.info(tensor)
            data = data or info.data
            for layer in info.layers:
                self.space.freeze(layer, reason)
        return Info(data=data)


@cache
def _arguments(func: Any) -> dict[str, tuple[int, Any]]:
    """Position and default value of an operator's arguments."""
    return {
        argument.name: (position, argument.default_value if argument.has_default_value() else None)
        for position, argument in enumerate(func._schema.arguments)
    }


def tensors_out(output: Any) -> list[Tensor]:
    """The tensors an operator returned."""
    values = output if isinstance(output, (list, tuple)) else [output]
    return [value for value in values if isinstance(value, Tensor)]
