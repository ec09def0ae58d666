"""What a rule may look at: one recorded operator with its arguments and their labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

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
    def where(self) -> str:
        """Operator and module path, for messages."""
        name = self.func.overloadpacket._qualified_op_name.replace("::", ".")
        return f"{name} at {self.recorder.module!r}" if self.recorder.module else name

    def info(self, value: Any) -> Info:
        """What is known of an argument."""
        return self.recorder.info(value) if isinstance(value, Tensor) else Info(uniform=True)

    def argument(self, name: str, default: Any = None) -> Any:
        """An argument by its name in the operator's schema."""
        for position, argument in enumerate(self.func._schema.arguments):
            if argument.name == name:
                if position < len(self.args):
                    return self.args[position]
                return self.kwargs.get(name, argument.default_value if argument.has_default_value() else default)
        return default

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


def tensors_out(output: Any) -> list[Tensor]:
    """The tensors an operator returned."""
    values = output if isinstance(output, (list, tuple)) else [output]
    return [value for value in values if isinstance(value, Tensor)]
