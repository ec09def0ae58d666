"""How a model is run with fewer channels: does it run, and does it compute the same as with these channels masked."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.inputs import call_model
from lightning_prune.graph.plain_numbers import PlainNumber, PlainNumbers
from lightning_prune.graph.recording import RunningModules, normalise_mode, tensors_in, untouched
from lightning_prune.model_state.cutting import Undo, cut_, resize_
from lightning_prune.model_state.preservation import copy_without_masks

LIMIT = 1e-8  # relative, in float64
Removed = Mapping[str, Tensor]  # group, its channels


@dataclass(frozen=True)
class Failure:
    """Why a smaller model did not run or was not equal: the modules that were running, innermost first."""

    stack: tuple[str, ...]
    message: str

    @classmethod
    def of(cls, error: Exception, running: RunningModules) -> Failure:
        """What a user's forward raised; the first line of its message."""
        return cls(running.paths, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")


class TrialRuns:
    """Runs copies of one model without some of its channels.

    Args:
        model: left as it is.
        example_inputs: what it is run on.
        modes: train flags to run it with.
    """

    def __init__(self, model: nn.Module, example_inputs: Any, modes: Sequence[bool]) -> None:
        self._model, self._inputs, self._modes = model, example_inputs, modes
        # On the meta device a run costs neither memory nor arithmetic.
        self._trial = _meta_copy(model)
        self._trial_inputs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), example_inputs)
        self._numbers = self._run()
        if isinstance(self._numbers, Failure):
            # The model looks at values (detectors count boxes), which change with the channels as its numbers do.
            self._trial, self._trial_inputs = copy_without_masks(model), example_inputs

    def failure(self, graph: ChannelGraph, removed: Removed) -> Failure | None:
        """Why the model does not run without these channels, None if it does."""
        undo = Undo(self._trial)
        try:
            _remove_(self._trial, graph, removed)
            found = self._run()
        finally:
            undo()
        if isinstance(found, Failure):
            return found
        if isinstance(self._numbers, Failure):
            return None
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
        masked = [self._outputs(trial, training) for training in self._modes]
        _remove_(trial, graph, removed)
        for training, before in zip(self._modes, masked, strict=True):
            if isinstance(before, Failure):
                return None  # does not run in float64 at all: nothing to compare with
            after = self._outputs(trial, training)
            if isinstance(after, Failure):
                return after
            if not _close(before, after):
                return Failure((), "its results change")
        return None

    def _run(self) -> list[PlainNumber] | Failure:
        """The plain numbers that operators get."""
        numbers: list[PlainNumber] = []
        with untouched(self._trial):
            for training in self._modes:
                normalise_mode(self._trial, training=training)
                with RunningModules(self._trial) as running, PlainNumbers(running, numbers):
                    try:
                        call_model(self._trial, self._trial_inputs)
                    except Exception as error:  # noqa: BLE001 - whatever a user's forward may raise
                        return Failure.of(error, running)
        return numbers

    def _outputs(self, trial: nn.Module, training: bool) -> list[Tensor] | Failure:
        inputs = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, self._inputs)
        with untouched(trial):
            normalise_mode(trial, training=training)
            torch.manual_seed(0)
            with RunningModules(trial) as running:
                try:
                    return tensors_in(call_model(trial, inputs))
                except Exception as error:  # noqa: BLE001 - whatever a user's forward may raise
                    return Failure.of(error, running)


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
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(model, memo)
