"""Watching outputs of modules and what enters them, with gradients.

Values are cloned where a gradient will be needed: an in-place ReLU or ``out += identity`` overwrites the
tensor between the forward hook and the backward pass. That costs one copy of every tapped activation, held
until its gradient arrives. Gradients are taken by a tensor hook registered before such an operation, so they
belong to the clone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_prune.criteria import functional
from lightning_prune.criteria.base import Tap
from lightning_prune.criteria.observe.functional_calls import FunctionalCalls
from lightning_prune.criteria.observe.watcher import (
    Watcher,
    channel_dim,
    check_batch,
    exactly,
    first_input,
    key_of,
    recomputing,
    samples_first,
    tracked,
)
from lightning_prune.errors import ScoreError
from lightning_prune.graph.groups import Group, Layer


@dataclass(eq=False)
class _Port:
    """One end of a module where taps look: its output, or (incoming) its first input."""

    path: str
    module: nn.Module
    incoming: bool
    filters: int | None
    audience: dict[Tap, list[tuple[str, Tensor]]] = field(default_factory=dict)
    checked: bool = False

    def check(self, tensor: Any) -> None:
        """Refuse what is not a batch of activations of the expected channels."""
        self.checked = True
        end = "input" if self.incoming else "output"
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise ScoreError(f"{self.path}: its {end} is {type(tensor).__name__}, not a floating-point tensor")
        check_batch(self.path, end, self.module, tensor)
        found = tensor.shape[channel_dim(self.module)]
        needed = 1 + max(int(index.max()) for listeners in self.audience.values() for _, index in listeners)
        if found != (self.filters or found) or found < needed:
            raise ScoreError(
                f"{self.path}: its {end} has shape {list(tensor.shape)}, but the graph expects "
                f"{self.filters or needed} channels; trace the model again"
            )


def _takes_only_that_in(module: nn.Module) -> bool:
    """Whether what a module's weight reads is what enters the module: of a block with layers in it, who knows."""
    layers = (_ConvNd, nn.Linear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
    return isinstance(module, layers) or next(module.children(), None) is None


class ActivationWatcher(Watcher):
    """Shows taps outputs of layers or of their batch norms, or what enters the layers that read them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._ports: dict[tuple[str, bool], _Port] = {}

    def listen(self, group: Group, tap: Tap) -> None:
        for layer in group.layers:
            key, index, port = key_of(group, layer, tap), layer.index, self._port(layer, tap)
            if port.incoming:
                assert layer.reader_index is not None
                index = layer.reader_index
            device = next((p.device for p in port.module.parameters(recurse=False)), index.device)
            port.audience.setdefault(tap, []).append((key, index.to(device)))
            self.shapes[key] = (group.size,)

    def _port(self, layer: Layer, tap: Tap) -> _Port:
        incoming = tap.site == "activation"
        path = layer.reader if incoming else (layer.norm if tap.site == "bn" else None) or layer.name
        if path is None:
            raise ScoreError(f"{layer.name}: no layer reads its channels; use site='bn' instead of 'activation'")
        if (path, incoming) not in self._ports:
            try:
                module = self.model.get_submodule(path)
            except AttributeError:
                raise ScoreError(f"the model has no module {path!r}; trace this model again") from None
            if incoming and not _takes_only_that_in(module):
                raise ScoreError(
                    f"{layer.name}: code of {path or 'the model'} reads its channels, somewhere between what enters "
                    "and leaves that module; use site='bn' instead of 'activation'"
                )
            self._ports[path, incoming] = port = _Port(path, module, incoming, None if incoming else layer.filters)
            if not incoming:
                self.audience[path] = [port]
        return self._ports[path, incoming]

    def start(self) -> None:
        super().start()
        incoming = {port.path: port for port in self._ports.values() if port.incoming}
        for port in incoming.values():
            handle = port.module.register_forward_pre_hook(partial(self._enter, port), with_kwargs=True)
            self.hooks.callback(handle.remove)
        modules = {path: port.module for path, port in incoming.items()}
        self.hooks.enter_context(
            FunctionalCalls(
                modules, before=lambda path, module, value, _: self._enter(incoming[path], module, (value,), {})
            )
        )

    def see(self, path: str, _module: nn.Module, _value: Any, output: Any) -> Tensor | None:
        return self._see(self._ports[path, False], output)

    def _enter(self, port: _Port, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensor = first_input(args, kwargs)
        if not recomputing():
            self._see(port, tensor)
        elif torch.is_grad_enabled() and any(tap.gradient for tap in port.audience):
            tensor.requires_grad_()  # as it was made to in the forward pass

    def _see(self, port: _Port, tensor: Any) -> Tensor | None:
        if not port.checked:
            port.check(tensor)
        value = samples_first(port.module, tensor.detach())
        now = [tap for tap in port.audience if not tap.gradient]
        later = [tap for tap in port.audience if tap.gradient]
        if not torch.is_grad_enabled():
            self.without_grad.update(key for tap in later for key, _ in port.audience[tap])
            later = []
        for tap in (*now, *later):
            for key, index in port.audience[tap]:
                self.open(port.path, key, tap, (len(value), len(index)), value.device)
        with exactly(value):
            self._add(port, now, value)
        if not later:
            return None
        replacement = None
        if port.incoming:  # others may read this very tensor; a replacement would miss their gradient
            tensor.requires_grad_()
        else:
            tensor, replacement = tracked(tensor)
        self.await_gradient(port.path, tensor, value.clone(), partial(self._add, port, later))
        return replacement

    def _add(self, port: _Port, taps: Iterable[Tap], value: Tensor, gradient: Tensor | None = None) -> None:
        dim = channel_dim(port.module)
        for tap in taps:
            maps = functional.by_position(value, dim)
            slope = None if gradient is None else functional.by_position(samples_first(port.module, gradient), dim)
            found = tap.partial(maps, slope)
            for key, index in port.audience[tap]:
                channels = functional.gather_channels(found, index)
                seen = self.seen[key][len(channels)]
                seen.add(channels, maps.shape[-1], differentiated=gradient is not None)
