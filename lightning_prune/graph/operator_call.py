"""What a rule may look at: one recorded operator with its arguments and their labels."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from torch import Tensor

from lightning_prune.graph.constraints import CallSite
from lightning_prune.graph.label_space import LabelSpace
from lightning_prune.graph.labels import Labels, TensorInfo
from lightning_prune.graph.recording import OperatorRecorder


@dataclass(eq=False)
class OperatorCall:
    """One recorded operator."""

    space: LabelSpace
    recorder: OperatorRecorder
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def name(self) -> str:
        """The operator without namespace; in-place variants under the name of their plain twin."""
        return self.func.overloadpacket._qualified_op_name.split("::")[1].removesuffix("_")

    @cached_property
    def where(self) -> str:
        """Operator and module path, for messages."""
        name = self.func.overloadpacket._qualified_op_name.replace("::", ".")
        return f"{name} at {self.recorder.module!r}" if self.recorder.module else name

    @cached_property
    def site(self) -> CallSite:
        """Where it ran, for constraints."""
        return CallSite(self.recorder.stack, self.recorder.kind, self.where)

    @cached_property
    def outputs(self) -> list[Tensor]:
        """The tensors that it returned."""
        values = self.output if isinstance(self.output, (list, tuple)) else [self.output]
        return [value for value in values if isinstance(value, Tensor)]

    @cached_property
    def tensors(self) -> list[Tensor]:
        """Every tensor argument, lists opened."""
        values = (*self.args, *self.kwargs.values())
        opened = (value if isinstance(value, (list, tuple)) else (value,) for value in values)
        return [item for items in opened for item in items if isinstance(item, Tensor)]

    def info(self, value: Any) -> TensorInfo:
        """What is known of an argument."""
        return self.recorder.info(value) if isinstance(value, Tensor) else TensorInfo(uniform=True)

    def argument(self, name: str, default: Any = None) -> Any:
        """An argument by its name in the operator's schema."""
        position, fallback = _arguments(self.func).get(name, (len(self.args), None))
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default if fallback is None else fallback)

    def rerun(self, tensor: Tensor) -> Any:
        """The operator with another first argument."""
        return self.func(tensor, *self.args[1:], **self.kwargs)

    def fold(self, labels: Labels, keep: Collection[int]) -> Labels | None:
        """See `LabelSpace.fold`."""
        return self.space.fold(labels, keep, self.where)

    def by_channel(self, reason: str, channels: Collection[int] = (1,)) -> list[Labels]:
        """The first argument's labels along its channels only; those that vary along none of them stay."""
        found = [(one, self.fold(one, channels)) for one in self.info(self.args[0]).labels]
        for labels, folded in found:
            if folded is None:
                self.freeze(labels, reason)
        return [folded for _, folded in found if folded is not None]

    def freeze(self, labels: Labels, reason: str) -> None:
        """These channels must stay."""
        self.space.freeze(labels.ids, reason)

    def freeze_statistic(self, labels: Labels, what: str = "enters a statistic") -> None:
        """These channels go at the price of a statistic that changes."""
        self.space.freeze(labels.ids, f"{what} over channels in {self.where}", statistics=True)

    def freeze_inputs(self, reason: str) -> TensorInfo:
        """Freeze every label that enters; the output has none."""
        infos = [self.info(tensor) for tensor in self.tensors]
        for info in infos:
            for labels in info.labels:
                self.freeze(labels, reason)
        return TensorInfo(data=any(info.data for info in infos))


@cache
def _arguments(func: Any) -> dict[str, tuple[int, Any]]:
    """Position and default value of an operator's arguments."""
    return {
        argument.name: (position, argument.default_value if argument.has_default_value() else None)
        for position, argument in enumerate(func._schema.arguments)
    }
