"""How a model is run with fewer channels: does it run, and does it compute the same as with these channels masked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.rules import rule_for
from lightning_prune.graph.rules.pointwise import elementwise
from lightning_prune.graph.rules.statistics import batch_norm
from lightning_prune.graph.running import (
    RunningModules,
    call_model,
    map_tensors,
    normalise_mode,
    tensors_in,
    untouched,
)
from lightning_prune.model_state.cutting import Undo, cut_, resize_
from lightning_prune.model_state.preservation import copy_without_masks

LIMIT = 1e-8  # relative, in float64
FILLING = ("aten.full", "aten.new_full", "aten.fill", "aten.scalar_tensor")
ANSWERS_TRUE = ("eq", "ne", "lt", "le", "gt", "ge", "logical", "bitwise", "isnan", "isinf", "isfinite", "where")
Removed = Mapping[str, Tensor]  # group, its channels


@dataclass(frozen=True)
class Failure:
    """Why a smaller model did not run or was not equal: the modules that were running, innermost first."""

    stack: tuple[str, ...]
    message: str


@dataclass(frozen=True)
class PlainNumber:
    """The plain numbers that one operator got, and the modules that were running, innermost first."""

    operator: str
    values: tuple[Any, ...]
    stack: tuple[str, ...]


class TrialRuns:
    """Runs copies of one model, with each of the train flags ``modes``, without some of its channels."""

    def __init__(self, model: nn.Module, example_inputs: Any, modes: Sequence[bool]) -> None:
        self._model, self._modes = model, modes
        self._doubles = map_tensors(lambda t: t.double() if t.is_floating_point() else t, example_inputs)
        # On the meta device a run costs neither memory nor arithmetic.
        self._trial = _meta_copy(model)
        self._inputs = map_tensors(lambda tensor: tensor.to("meta"), example_inputs)
        self._warm = False
        self._numbers = self._plain_numbers()
        if isinstance(self._numbers, Failure):
            # The model looks at values (detectors count boxes), which change with the channels as its numbers do.
            self._trial, self._inputs = copy_without_masks(model), example_inputs

    def failure(self, graph: ChannelGraph, removed: Removed) -> Failure | None:
        """Why the model does not run without these channels, None if it does."""
        undo = Undo(self._trial)
        try:
            _remove_(self._trial, graph, removed)
            found = self._plain_numbers()
        finally:
            undo()
        if isinstance(found, Failure):
            return found
        if isinstance(self._numbers, Failure):
            return None
        if not self._warm and [n.operator for n in self._numbers] != [n.operator for n in found]:
            self._warm = True
            cold, self._numbers = self._numbers, self._plain_numbers()
            if isinstance(self._numbers, Failure) or cold != self._numbers:
                # A run leaves something behind, such as an lru_cache, that the next one finds: both are run warm, and
                # since what was made from sizes is not made again, results have to tell.
                return self.failure(graph, removed) or self.difference(graph, removed)
        for before, after in zip(self._numbers, found, strict=False):
            if before.operator != after.operator:
                return Failure(after.stack, f"takes another path: {before.operator}, then {after.operator}")
            if before.values != after.values:
                return Failure(after.stack, f"{before.operator} gets {before.values}, then {after.values}")
        return None if len(self._numbers) == len(found) else Failure((), "takes another path with fewer channels")

    def difference(self, graph: ChannelGraph, removed: Removed) -> Failure | None:
        """Why removing these channels does not equal masking them, None if it does."""
        trial = copy_without_masks(self._model).double()
        _roughen_(trial)
        _mask_(trial, graph, removed)
        masked = [_run(trial, self._doubles, training) for training in self._modes]
        _remove_(trial, graph, removed)
        for training, before in zip(self._modes, masked, strict=True):
            if isinstance(before, Failure):
                return None  # does not run in float64 at all: nothing to compare with
            after = _run(trial, self._doubles, training)
            if isinstance(after, Failure):
                return after
            if not _close(before, after):
                return Failure((), "its results change")
        return None

    def _plain_numbers(self) -> list[PlainNumber] | Failure:
        numbers: list[PlainNumber] = []
        outputs = (_run(self._trial, self._inputs, training, numbers) for training in self._modes)
        return next((output for output in outputs if isinstance(output, Failure)), numbers)


def _run(
    model: nn.Module, inputs: Any, training: bool, numbers: list[PlainNumber] | None = None
) -> list[Tensor] | Failure:
    """The tensors that a model returns. numbers: takes down the plain numbers that operators get."""
    with untouched(model):
        normalise_mode(model, training=training)
        torch.manual_seed(0)
        with RunningModules(model) as running, nullcontext() if numbers is None else _PlainNumbers(running, numbers):
            try:
                return tensors_in(call_model(model, inputs))
            except Exception as error:  # noqa: BLE001 - whatever a user's forward may raise
                message = str(error).strip().partition("\n")[0]
                return Failure(running.paths, f"{type(error).__name__}: {message}")


class _PlainNumbers(TorchDispatchMode):
    """Notes the numbers that go into arithmetic: one that changes with the channels was computed from their count.

    On the meta device it also answers for the commonest operators, which torch decomposes into many there.
    """

    def __init__(self, running: RunningModules, found: list[PlainNumber]) -> None:
        super().__init__()
        self._running = running
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket._qualified_op_name.replace("::", ".")
        rule = rule_for(func)
        arguments = (*args, *kwargs.values())
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        if rule is elementwise or name.startswith(FILLING):
            numbers = tuple(value for value in arguments if isinstance(value, (int, float)))
            if numbers:
                self._found.append(PlainNumber(name, numbers, self._running.paths))
        if rule is elementwise and _keeps_form(name, args[0], tensors):
            return args[0] if func._schema.is_mutable else torch.empty_like(args[0])
        if rule is batch_norm and args[0].is_meta:
            x, *vectors = tensors
            if any(len(vector) != x.shape[1] for vector in vectors):
                sizes = [len(vector) for vector in vectors]
                raise RuntimeError(f"batch norm over {x.shape[1]} channels has parameters for {sizes}")
            return torch.empty_like(x), x.new_empty(0), x.new_empty(0)
        return func(*args, **kwargs)


def _keeps_form(name: str, first: Any, tensors: list[Tensor]) -> bool:
    """Whether the result is like the first argument: floating meta tensors of one shape, or one and numbers."""
    return (
        first is tensors[0]
        and all(t.is_meta and t.is_floating_point() and t.shape == first.shape for t in tensors)
        and not name.removeprefix("aten.").startswith(ANSWERS_TRUE)
    )


def _close(before: list[Tensor], after: list[Tensor]) -> bool:
    if [t.shape for t in before] != [t.shape for t in after]:
        return False
    for first, second in zip(before, after, strict=True):
        if first.is_floating_point():
            finite = first.isfinite() & second.isfinite()
            gap = (first - second)[finite].abs()
            if gap.any() and float(gap.max()) > LIMIT * float(first[finite].abs().max()):
                return False
    return True


def _remove_(model: nn.Module, graph: ChannelGraph, removed: Removed) -> None:
    """Cut channels out of tensors and size attributes."""
    cut_(model, graph.cuts(removed))
    resize_(model, graph.new_sizes(removed))


def _mask_(model: nn.Module, graph: ChannelGraph, removed: Removed) -> None:
    """Set channels to zero."""
    parameters = dict(model.named_parameters())
    for name, channels in removed.items():
        for part in graph.group(name).slices:
            if part.masked:
                data = parameters[part.tensor].data
                data.index_fill_(part.dim, part.index[channels].flatten().to(data.device), 0)


def _roughen_(model: nn.Module) -> None:
    """Random numbers where a fresh model has constants (biases, scales): zeros and ones would hide differences."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        data = parameter.data
        if data.is_floating_point() and data.dim() <= 1 < data.numel() and bool((data == data[0]).all()):
            noise = torch.rand(data.shape, generator=generator) * 0.4 + 0.8
            base = data if bool(data[0].abs() > 1e-3) else torch.ones_like(data)
            parameter.data = base * noise.to(device=data.device, dtype=data.dtype)


def _meta_copy(model: nn.Module) -> nn.Module:
    """A copy whose tensors have shapes but no values."""
    parameters = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in model.parameters()}
    return copy_without_masks(model, {**parameters, **{id(b): b.detach().to("meta") for b in model.buffers()}})
