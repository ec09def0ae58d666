"""Copies of a model that are run with fewer channels: on the meta device, with values, or with values in float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.running import RunningModules, untouched
from lightning_prune.model_state.cutting import Undo, cut_, resize_
from lightning_prune.model_state.preservation import (
    copy_without_masks,
    places_of,
    put_back,
    random_state,
    set_random_state,
)

Removed = Mapping[str, Tensor]  # group, its channels


class ModelCopy:
    """A copy of a model, with what every run of it needs.

    has_values: not on the meta device, where a run costs neither memory nor arithmetic.
    """

    def __init__(self, model: nn.Module, *, has_values: bool) -> None:
        self.model = model
        self.has_values = has_values
        self.modules = list(model.modules())
        self._names = {id(module): name for name, module in model.named_modules()}
        self._places = places_of(model)

    def running(self) -> RunningModules:
        """To be entered for one run."""
        return RunningModules(self.model, self._names)

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """As `lightning_prune.graph.running.untouched`, within `by_operators`; without values there is less to save."""
        if self.has_values:
            with untouched(self.model):
                yield
            return
        before = random_state(self.model)
        try:
            yield
        finally:
            set_random_state(before)
            put_back(self._places)

    @contextmanager
    def without(self, graph: ChannelGraph, removed: Removed) -> Iterator[None]:
        """For a while the copy has lost these channels."""
        undo = Undo(self.model)
        try:
            cut_(self.model, graph.cuts(removed))
            resize_(self.model, graph.new_sizes(removed))
            yield
        finally:
            undo()

    @contextmanager
    def masked(self, graph: ChannelGraph, removed: Removed) -> Iterator[None]:
        """For a while these channels are zero."""
        undo = Undo(self.model)
        parameters = dict(self.model.named_parameters())
        try:
            for name, channels in removed.items():
                for part in graph.group(name).slices:
                    if part.masked:
                        parameter = parameters[part.tensor]
                        entries = part.index[channels].flatten().to(parameter.device)
                        parameter.data = parameter.data.index_fill(part.dim, entries, 0)
            yield
        finally:
            undo()


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy whose tensors have shapes but no values."""
    parameters = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in model.parameters()}
    return copy_without_masks(model, {**parameters, **{id(b): b.detach().to("meta") for b in model.buffers()}})


def double_copy(model: nn.Module) -> nn.Module:
    """A copy in float64, with random numbers where a fresh model has constants (biases, scales).

    Zeros and ones would hide differences.
    """
    copy = copy_without_masks(model).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in copy.parameters():
        data = parameter.data
        if data.is_floating_point() and data.dim() <= 1 < data.numel() and bool((data == data[0]).all()):
            noise = torch.rand(data.shape, generator=generator) * 0.4 + 0.8
            base = data if bool(data[0].abs() > 1e-3) else torch.ones_like(data)
            parameter.data = base * noise.to(device=data.device, dtype=data.dtype)
    return copy
