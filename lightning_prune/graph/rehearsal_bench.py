"""Run smaller copies of a model: does it run, does it compute the same, and with which plain numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from lightning_prune.graph.groups import ChannelGraph, Group
from lightning_prune.graph.inputs import call_model
from lightning_prune.graph.recording import module_stack, normalise_mode, tensors_in, untouched
from lightning_prune.graph.rules import rule_for
from lightning_prune.graph.rules.pointwise import elementwise
from lightning_prune.graph.rules.statistics import batch_norm
from lightning_prune.model_state.cutting import Undo, cut_, resize_
from lightning_prune.model_state.preservation import copy_without_masks

M = TypeVar("M")
Share = Callable[[int, Group], Tensor]  # of the group at a position, which channels go
LIMIT = 1e-8  # relative, in float64


@dataclass(frozen=True)
class Failure:
    """Why a smaller model did not run or was not equal: the running modules, innermost first."""

    stack: tuple[str, ...]
    message: str


class Bench:
    """Runs smaller copies of one model."""

    def __init__(self, model: nn.Module, example_inputs: Any, modes: list[bool]) -> None:
        self.model = model
        self.modes = modes
        self.inputs = example_inputs
        self.runner, self.runner_inputs = meta_copy(model), to_meta(example_inputs)
        self.numbers_count = True
        dense = self._run()
        if isinstance(dense, Failure):
            # The model looks at values (detectors count boxes), which change with the channels as its numbers do.
            self.runner, self.runner_inputs = copy_without_masks(model), example_inputs
            dense = []
            self.numbers_count = False
        self.numbers = dense

    def runs(self, graph: ChannelGraph, groups: tuple[Group, ...], share: Share) -> Failure | None:
        """Why the model does not run without some of these groups' channels, None if it does."""
        with removed(self.runner, graph, groups, share):
            found = self._run()
        if isinstance(found, Failure):
            return found
        if not self.numbers_count:
            return None
        for before, after in zip(self.numbers, found, strict=False):
            if before.operator != after.operator:
                return Failure(after.stack, f"takes another path: {before.operator}, then {after.operator}")
            if before.values != after.values:
                return Failure(after.stack, f"{before.operator} gets {before.values}, then {after.values}")
        if len(self.numbers) != len(found):
            return Failure((), "takes another path with fewer channels")
        return None

    def _run(self) -> list[Number] | Failure:
        numbers: list[Number] = []
        with untouched(self.runner):
            for training in self.modes:
                normalise_mode(self.runner, training=training)
                with module_stack(self.runner) as stack, Numbers(stack, numbers):
                    try:
                        call_model(self.runner, self.runner_inputs)
                    except Exception as error:  # noqa: BLE001 - whatever a user's forward may raise
                        return Failure(tuple(reversed(stack)), _first_line(error))
        return numbers

    def differs(self, graph: ChannelGraph, groups: tuple[Group, ...], shares: Sequence[Share]) -> Failure | None:
        """Why removing some of these groups' channels does not equal masking them, None if it does."""
        return next((found for share in shares if (found := self._differs(graph, groups, share)) is not None), None)

    def _differs(self, graph: ChannelGraph, groups: tuple[Group, ...], share: Share) -> Failure | None:
        copied = copy_without_masks(self.model).double()
        inputs = to_double(self.inputs)
        roughen_(copied)
        with untouched(copied):
            for training in self.modes:
                normalise_mode(copied, training=training)
                with masked(copied, groups, share), module_stack(copied) as stack:
                    torch.manual_seed(0)
                    try:
                        before = tensors_in(call_model(copied, inputs))
                    except Exception:  # noqa: BLE001 - does not run in float64 at all: nothing to compare with
                        return None
                    with removed(copied, graph, groups, share):
                        torch.manual_seed(0)
                        try:
                            after = tensors_in(call_model(copied, inputs))
                        except Exception as error:  # noqa: BLE001 - whatever a user's forward may raise
                            return Failure(tuple(reversed(stack)), _first_line(error))
                if not _close(before, after):
                    return Failure((), "its results change")
        return None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _close(before: list[Tensor], after: list[Tensor]) -> bool:
    if [t.shape for t in before] != [t.shape for t in after]:
        return False
    for first, second in zip(before, after, strict=True):
        if first.is_floating_point() and first.numel():
            finite = first.isfinite() & second.isfinite()
            scale = float(first[finite].abs().max()) if finite.any() else 0.0
            if (
                float((first - second)[finite].abs().sum())
                and float((first - second)[finite].abs().max()) > LIMIT * scale
            ):
                return False
    return True


def half(_: int, group: Group) -> Tensor:
    """About half of a group's channels, the same at every call."""
    generator = torch.Generator().manual_seed(group.size)
    return torch.randperm(group.size, generator=generator)[: group.size // 2].sort().values


def first(_: int, group: Group) -> Tensor:
    """A single channel: what is left rarely divides as it did."""
    return torch.arange(min(1, group.size))


def last(_: int, group: Group) -> Tensor:
    """The other end: of uneven pieces another one shrinks."""
    return torch.tensor([group.size - 1])


def most(_: int, group: Group) -> Tensor:
    """All but one channel."""
    return torch.arange(group.size - 1)


def even(position: int, group: Group) -> Tensor:
    """Half of every other group: neighbours no longer shrink alike."""
    return half(position, group) if position % 2 == 0 else torch.arange(0)


def odd(position: int, group: Group) -> Tensor:
    """Half of the others."""
    return even(position + 1, group)


@contextmanager
def removed(model: nn.Module, graph: ChannelGraph, groups: tuple[Group, ...], share: Share) -> Iterator[None]:
    """The model without a share of these groups' channels."""
    gone = {group.name: share(position, group) for position, group in enumerate(groups)}
    undo = Undo(model)
    try:
        cut_(model, graph.cuts(gone))
        resize_(model, graph.new_sizes(gone))
        yield
    finally:
        undo()


@contextmanager
def masked(model: nn.Module, groups: tuple[Group, ...], share: Share) -> Iterator[None]:
    """The model with a share of these groups' channels at zero."""
    undo = Undo(model)
    named = dict(model.named_parameters())
    try:
        for position, group in enumerate(groups):
            gone = share(position, group)
            for part in group.slices:
                if part.masked:
                    tensor = named[part.tensor]
                    tensor.data = tensor.data.index_fill(part.dim, part.index[gone].flatten().to(tensor.device), 0)
        yield
    finally:
        undo()


def roughen_(model: nn.Module) -> None:
    """Random numbers where a fresh model has constants (biases, scales): zeros and ones would hide differences."""
    generator = torch.Generator().manual_seed(0)
    for tensor in model.parameters():
        if (
            tensor.is_floating_point()
            and tensor.dim() <= 1
            and tensor.numel() > 1
            and bool((tensor == tensor[0]).all())
        ):
            noise = torch.rand(tensor.shape, generator=generator) * 0.4 + 0.8
            base = tensor.data if bool(tensor[0].abs() > 1e-3) else torch.ones_like(tensor.data)
            tensor.data = base * noise.to(device=tensor.device, dtype=tensor.dtype)


@dataclass(frozen=True)
class Number:
    """The plain numbers that one operator got."""

    operator: str
    values: tuple[Any, ...]
    stack: tuple[str, ...]


class Numbers(TorchDispatchMode):
    """Notes the numbers that go into arithmetic: one that changes with the channels was computed from their count.

    On the meta device it also answers for the commonest operators, which torch decomposes into many there.
    """

    def __init__(self, stack: list[str], found: list[Number]) -> None:
        super().__init__()
        self.stack = stack
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket._qualified_op_name.replace("::", ".")
        if rule_for(func) is elementwise or name.startswith(_FILLED):
            values = tuple(value for value in (*args, *kwargs.values()) if isinstance(value, (int, float)))
            if values:
                self.found.append(Number(name, values, tuple(reversed(self.stack))))
        if rule_for(func) is elementwise:
            if _is_simple(func, args, kwargs):
                return args[0] if func._schema.is_mutable else torch.empty_like(args[0])
        elif rule_for(func) is batch_norm and args[0].is_meta:
            return _normalised(args[0], [value for value in (*args[1:], *kwargs.values()) if isinstance(value, Tensor)])
        return func(*args, **kwargs)


_FILLED = ("aten.full", "aten.new_full", "aten.fill", "aten.scalar_tensor")
_ANSWERS_TRUE = ("eq", "ne", "lt", "le", "gt", "ge", "logical", "bitwise", "isnan", "isinf", "isfinite", "where")


def _is_simple(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether the result is like the first argument: floating meta tensors of one shape, or one and numbers."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    return (
        args[0] is tensors[0]
        and all(t.is_meta and t.is_floating_point() and t.shape == args[0].shape for t in tensors)
        and not func._schema.name.removeprefix("aten::").startswith(_ANSWERS_TRUE)
    )


def _normalised(x: Tensor, vectors: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    if any(len(vector) != x.shape[1] for vector in vectors):
        raise RuntimeError(f"batch norm over {x.shape[1]} channels has parameters for {[len(v) for v in vectors]}")
    return torch.empty_like(x), x.new_empty(0), x.new_empty(0)


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy whose tensors have shapes but no values."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(model, memo)


def to_meta(value: M) -> M:
    """The same nested containers with meta tensors."""
    return tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, value)


def to_double(value: M) -> M:
    """The same nested containers with floating tensors in float64."""

    def cast(leaf: Any) -> Any:
        return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return tree_map(cast, value)
