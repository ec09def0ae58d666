"""Copies of a model that are run with fewer channels: on the meta device, with values, or with values in float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.running import RunningModules, untouched
from lightning_prune.model_state.cutting import Cut, Undo, cut_, rescale_means_, resize_
from lightning_prune.model_state.preservation import (
    copy_without_masks,
    generators_of,
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
        self._paths = set(self._names.values())
        self._tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self._generators = generators_of(model)
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
        before = random_state(self.model, self._generators)
        try:
            yield
        finally:
            set_random_state(before)
            put_back(self._places)

    @contextmanager
    def without(self, graph: ChannelGraph, removed: Removed) -> Iterator[None]:
        """For a while the copy has lost these channels."""
        undo = Undo(self.model, tensors=self.has_values)
        before = [] if self.has_values else [(tensor, tensor.data) for tensor in self._tensors.values()]
        try:
            cuts = [cut for cut in graph.cuts(removed) if cut.tensor in self._tensors]
            if self.has_values:
                cut_(self.model, cuts)
            else:
                self._shrink_(cuts)
            resize_(self.model, [size for size in graph.new_sizes(removed) if size.module in self._paths])
            if self.has_values:
                rescale_means_(
                    self.model, [one for one in graph.mean_rescalings(removed) if one.weight in self._tensors]
                )
            yield
        finally:
            for tensor, data in before:
                tensor.data = data
            undo()

    def _shrink_(self, cuts: Sequence[Cut]) -> None:
        """Give tensors without values the shapes that these cuts leave."""
        shapes: dict[str, list[int]] = {}
        for cut in cuts:
            tensor = self._tensors[cut.tensor]
            if tensor.is_contiguous():
                shapes.setdefault(cut.tensor, list(tensor.shape))[cut.dim] = len(cut.keep)
            else:
                tensor.data = cut.apply(tensor.data)
        for name, shape in shapes.items():
            self._tensors[name].data = torch.empty(shape, dtype=self._tensors[name].dtype, device="meta")

    @contextmanager
    def masked(self, graph: ChannelGraph, removed: Removed) -> Iterator[None]:
        """For a while these channels are zero."""
        undo = Undo(self.model)
        parameters = dict(self.model.named_parameters())
        try:
            for name, channels in removed.items():
                for part in graph.group(name).slices:
                    if part.masked and part.tensor in parameters:
                        parameter = parameters[part.tensor]
                        entries = part.index[channels].flatten().to(parameter.device)
                        parameter.data = parameter.data.index_fill(part.dim, entries, 0)
            yield
        finally:
            undo()


def cast_copy(model: nn.Module, dtype: torch.dtype, left_out: Mapping[str, nn.Module]) -> nn.Module:
    """A copy in one floating type, with random numbers where a fresh model has constants (biases, scales).

    Zeros and ones would hide differences. left_out: {path: module} of what is not copied.
    """
    gone = {id(inner) for module in left_out.values() for inner in module.modules()}
    twins: dict[int, Any] = {id(module): nn.Identity() for module in left_out.values()}
    for module in (module for module in model.modules() if id(module) not in gone):
        own = (*module._parameters.values(), *module._buffers.values())
        for tensor in (t for t in own if t is not None and id(t) not in twins):
            if type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point() and tensor.dtype != dtype:
                cast = tensor.detach().to(dtype)  # at once, which holds every weight once less in memory
                is_parameter = isinstance(tensor, nn.Parameter)
                twins[id(tensor)] = nn.Parameter(cast, requires_grad=tensor.requires_grad) if is_parameter else cast
    copy = copy_without_masks(model, twins)
    for path in left_out:
        parent, _, name = path.rpartition(".")
        del copy.get_submodule(parent)._modules[name]
    copy = copy.to(dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in copy.parameters():
        data = parameter.data
        if data.is_floating_point() and data.dim() <= 1 < data.numel() and bool((data == data[0]).all()):
            noise = torch.rand(data.shape, generator=generator) * 0.4 + 0.8
            base = data if bool(data[0].abs() > 1e-3) else torch.ones_like(data)
            parameter.data = base * noise.to(device=data.device, dtype=data.dtype)
    return copy
