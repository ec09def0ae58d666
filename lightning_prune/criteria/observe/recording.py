"""Hooks that show taps the tensors at their sites, and the sums of one batch.

Values are cloned where a gradient will be needed: an in-place ReLU or ``out += identity`` overwrites the
tensor between the forward hook and the backward pass. That costs one copy of every tapped activation, held
until its gradient arrives. Gradients are taken by a tensor hook registered before such an operation, so they
belong to the clone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from lightning_prune.criteria import functional
from lightning_prune.criteria.base import Tap
from lightning_prune.criteria.observe.readers import ReaderWatcher, readers_of
from lightning_prune.criteria.observe.rectifiers import RectifierWatcher
from lightning_prune.criteria.observe.sampling import SampledReaderWatcher
from lightning_prune.criteria.observe.watching import Ledger, Place, Watcher, WeightWatcher
from lightning_prune.errors import ScoreError
from lightning_prune.graph import ChannelGraph, Group, Layer


@dataclass
class _Sum:
    """What one tap has seen at one port in the current batch."""

    samples: int
    filters: int
    positions: int = 0
    partial: Tensor | None = None

    def add(self, partial: Tensor, positions: int) -> None:
        self.partial = partial if self.partial is None else self.partial + partial
        self.positions += positions


@dataclass(eq=False)
class _Port:
    """One end of a module where taps look: its output, or (incoming) its first input."""

    path: str
    module: nn.Module
    incoming: bool
    filters: int | None
    audience: dict[Tap, list[tuple[str, Layer, Tensor]]] = field(default_factory=dict)

    @property
    def channel_dim(self) -> int:
        return -1 if self._weight_dims == 2 else 1

    @property
    def _weight_dims(self) -> int | None:
        weight = getattr(self.module, "weight", None)
        return weight.ndim if isinstance(weight, Tensor) else None

    def check(self, tensor: Any) -> None:
        """Refuse what is not a batch of activations of the expected channels."""
        end = "input" if self.incoming else "output"
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise ScoreError(f"{self.path}: its {end} is {type(tensor).__name__}, not a floating-point tensor")
        convolution = self._weight_dims is not None and self._weight_dims > 2
        if tensor.ndim < 2 or (convolution and tensor.ndim != self._weight_dims):
            raise ScoreError(f"{self.path}: its {end} has shape {list(tensor.shape)}; a batch dimension is needed")
        found = tensor.shape[self.channel_dim]
        needed = 1 + max(int(index.max()) for members in self.audience.values() for *_, index in members)
        if found != (self.filters or found) or found < needed:
            raise ScoreError(
                f"{self.path}: its {end} has shape {list(tensor.shape)}, but the graph expects "
                f"{self.filters or needed} channels; trace the model again"
            )


class Recorder:
    """Records what taps see while `recording` is on. Hooks are in place only then.

    Args:
        model: the model the graph was traced on.
        graph: its channel graph.
        taps: what to look at.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, taps: Sequence[Tap]) -> None:
        self._ports: dict[tuple[str, bool], _Port] = {}
        ledger = Ledger()
        self.edges, self.differentiated, self.without_grad = ledger.edges, ledger.differentiated, ledger.without_grad
        self._weights = WeightWatcher(ledger, model)
        self._readers = ReaderWatcher(ledger, model)
        self._rectifiers = RectifierWatcher(ledger, model)
        self._sampled = SampledReaderWatcher(ledger, model)
        self._watchers: tuple[Watcher, ...] = (self._weights, self._readers, self._rectifiers, self._sampled)
        for group in graph.prunable_groups:
            for tap in taps:
                self._listen_to_group(model, group, tap)
        self._handles: list[RemovableHandle] = []
        self._sums: dict[tuple[_Port, Tap], _Sum] = {}
        self._checked: set[_Port] = set()
        self._reference = False

    @property
    def on(self) -> bool:
        """Whether hooks are in place."""
        return bool(self._handles) or any(watcher.on for watcher in self._watchers)

    def shape(self, group: Group, layer: Layer, tap: Tap) -> tuple[int, ...]:
        """Of the sum that a tap makes for a layer."""
        if not tap.joint:
            return (group.size,)
        return group.size, self._weights.widths.get(key_of(group, layer, tap), group.size)

    def start(self, *, reference: bool) -> None:
        """Install hooks for the taps on the current model, or on the reference."""
        self._reference = reference
        for port in self._ports.values():
            if not self._active(port):
                continue
            if port.incoming:
                hook = port.module.register_forward_pre_hook(partial(self._enter, port), with_kwargs=True)
            else:
                hook = port.module.register_forward_hook(partial(self._leave, port))
            self._handles.append(hook)
        if not reference:
            for watcher in self._watchers:
                watcher.start()

    def stop(self) -> None:
        """Remove hooks and forget the batch."""
        while self._handles:
            self._handles.pop().remove()
        for watcher in self._watchers:
            watcher.stop()
        self._sums.clear()
        self.edges.clear()

    def totals(self) -> Iterator[tuple[str, Tensor, int]]:
        """(key, sum (channels,), count) of every layer that ran in this batch.

        A layer that ran but got no gradient contributes zero: the loss does not depend on it.
        """
        for (port, tap), seen in self._sums.items():
            total = seen.partial
            for key, _, index in port.audience[tap]:
                if total is None:
                    total = torch.zeros(seen.samples, seen.filters, dtype=torch.float64, device=index.device)
                yield (key, *_reduced(tap, functional.gather_channels(total, index), seen.positions))
        for watcher in self._watchers:
            for key, found in watcher.totals():
                yield (key, *_reduced(found.tap, found.partial, found.positions))

    def got_gradient(self) -> bool:
        """Whether any gradient arrived in this batch."""
        watched = (seen for watcher in self._watchers for seen in watcher.seen.values())
        return any(tap.gradient and seen.partial is not None for (_, tap), seen in self._sums.items()) or any(
            seen.arrived for seen in watched
        )

    def _listen_to_group(self, model: nn.Module, group: Group, tap: Tap) -> None:
        keys = {layer.name: key_of(group, layer, tap) for layer in group.layers}
        if tap.site in ("reader", "reader_weight", "reader_rows"):
            for path, place in readers_of(model, group).items():
                if tap.site == "reader_rows":
                    self._sampled.listen(key_of(group, group.layers[0], tap), tap, path, place)
                    continue
                if tap.site == "reader":
                    self._readers.listen(list(keys.values()), tap, path, place)
                    continue
                for key in dict.fromkeys(keys.values()):
                    self._weights.listen(key, tap, place)
            return
        for layer in group.layers:
            if tap.site == "weight":
                self._weights.listen(keys[layer.name], tap, Place(layer.weight, layer.dim, layer.index))
            elif tap.site == "rectifier":
                self._rectifiers.listen(keys[layer.name], tap, layer)
            else:
                self._listen(model, keys[layer.name], layer, tap)

    def _listen(self, model: nn.Module, key: str, layer: Layer, tap: Tap) -> None:
        path, index, incoming = layer.name, layer.index, False
        filters: int | None = layer.filters
        if tap.site == "bn" and layer.norm is not None:
            path = layer.norm
        elif tap.site == "activation":
            if layer.reader is None or layer.reader_index is None:
                raise ScoreError(f"{layer.name}: no layer reads its channels; use site='bn' instead of 'activation'")
            path, index, incoming, filters = layer.reader, layer.reader_index, True, None
        try:
            module = model.get_submodule(path)
        except AttributeError:
            raise ScoreError(f"the model has no module {path!r}; trace this model again") from None
        port = self._ports.setdefault((path, incoming), _Port(path, module, incoming, filters))
        device = next((p.device for p in module.parameters(recurse=False)), index.device)
        port.audience.setdefault(tap, []).append((key, layer, index.to(device)))

    def _active(self, port: _Port) -> list[Tap]:
        return [tap for tap in port.audience if tap.reference == self._reference]

    def _enter(self, port: _Port, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._observe(port, args[0] if args else next(iter(kwargs.values()), None))

    def _leave(self, port: _Port, _module: nn.Module, _args: Any, output: Any) -> Tensor | None:
        return self._observe(port, output)

    def _observe(self, port: _Port, tensor: Any) -> Tensor | None:
        if torch._C._current_graph_task_id() != -1:
            return None  # activation checkpointing repeats the forward pass inside the backward pass
        if port not in self._checked:
            port.check(tensor)
            self._checked.add(port)
        value = tensor.detach()
        waiting = []
        for tap in self._active(port):
            if tap.gradient and not torch.is_grad_enabled():
                self.without_grad.update(key for key, *_ in port.audience[tap])
                continue
            seen = self._open(port, tap, tensor)
            if tap.gradient:
                waiting.append((tap, seen))
            else:
                self._add(port, tap, seen, value, None)
        return self._await_gradient(port, tensor, waiting) if waiting else None

    def _open(self, port: _Port, tap: Tap, tensor: Tensor) -> _Sum:
        samples = len(tensor)
        seen = self._sums.setdefault((port, tap), _Sum(samples, tensor.shape[port.channel_dim]))
        if seen.samples != samples:
            raise ScoreError(
                f"{port.path}: called with {seen.samples} and with {samples} samples in one batch, which "
                "cannot be matched; score on one batch per step"
            )
        return seen

    def _await_gradient(self, port: _Port, tensor: Tensor, waiting: list[tuple[Tap, _Sum]]) -> Tensor | None:
        replacement = None
        if tensor.requires_grad:
            value = tensor.detach().clone()
        elif port.incoming:
            # Others may read this very tensor; a replacement would miss their gradient.
            tensor.requires_grad_()
            value = tensor.detach().clone()
        else:
            # All upstream is frozen. The leaf stays as it is; what goes on may be overwritten in place.
            tensor = tensor.detach().requires_grad_()
            value = tensor.detach()
            replacement = tensor.clone()
        hook = partial(self._differentiate, port, waiting, [value])
        tensor.register_hook(hook)
        self.edges.append(get_gradient_edge(tensor))
        return replacement

    def _differentiate(
        self, port: _Port, waiting: list[tuple[Tap, _Sum]], held: list[Tensor], gradient: Tensor
    ) -> None:
        if not self.on:
            return  # a backward pass after the batch was closed
        if not held:
            raise ScoreError(
                f"{port.path}: more than one backward pass reached it in one batch; add the losses up first"
            )
        value = held.pop()
        for tap, seen in waiting:
            self._add(port, tap, seen, value, gradient.detach())
            self.differentiated.update(key for key, *_ in port.audience[tap])

    @staticmethod
    def _add(port: _Port, tap: Tap, seen: _Sum, value: Tensor, gradient: Tensor | None) -> None:
        # Autocast would run the kernels in half precision.
        with torch.no_grad(), torch.autocast(value.device.type, enabled=False):
            value = functional.by_position(value, port.channel_dim)
            if gradient is not None:
                gradient = functional.by_position(gradient, port.channel_dim)
            seen.add(tap.partial(value, gradient), value.shape[-1])


def key_of(group: Group, layer: Layer, tap: Tap) -> str:
    """Under what a scorer keeps the sum of a tap for a layer; `Tap.joint` ones have it under the group's first."""
    owner = group.layers[0] if tap.joint else layer
    return f"{group.name}/{owner.name}/{tap.name}"


def _reduced(tap: Tap, channels: Tensor, positions: int) -> tuple[Tensor, int]:
    """Sum and count of a batch from (N, channels)."""
    if tap.gradient and not tap.joint:
        channels = channels * float(len(channels)) ** tap.degree
    return tap.reduce(channels, max(positions, 1))
