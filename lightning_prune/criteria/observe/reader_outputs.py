"""Watching what each channel adds to the output of every layer that reads it, with the gradient there."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_prune.criteria import functional
from lightning_prune.criteria.base import Tap
from lightning_prune.criteria.channel_contributions import (
    channel_contributions,
    check_computable,
    next_layers,
)
from lightning_prune.criteria.observe.hooks import calls_of
from lightning_prune.criteria.observe.watcher import Watcher, check_batch, key_of, tracked
from lightning_prune.graph.groups import Group


@dataclass(frozen=True, eq=False)
class _Listener:
    """One tap on one reader: the same for all layers of a group, whose keys these are."""

    keys: tuple[str, ...]
    tap: Tap
    index: Tensor


class ReaderOutputWatcher(Watcher):
    """Shows taps what each channel adds to a reader's output, `Tap.chunk` channels at once.

    A copy of what enters the layer is held until its gradient arrives.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._audience: dict[str, list[_Listener]] = {}

    @override
    def listen(self, group: Group, tap: Tap) -> None:
        keys = tuple(key_of(group, layer, tap) for layer in group.layers)
        self.shapes.update((key, (group.size,)) for key in keys)
        for path, reader in next_layers(self.model, group).items():
            check_computable(self.model, path, "NextLayerTaylor(form='weight'), or another criterion such as Taylor")
            self._audience.setdefault(path, []).append(_Listener(keys, tap, reader.index))

    @override
    def start(self) -> None:
        self.hooks.enter_context(calls_of(self.model, self._audience, self._leave))

    def _leave(self, path: str, module: nn.Module, value: Any, output: Tensor) -> Tensor | None:
        listeners = self._audience[path]
        if not torch.is_grad_enabled():
            self.without_grad.update(key for listener in listeners for key in listener.keys)
            return None
        check_batch(path, "input", module, value)
        for listener in listeners:
            for key in listener.keys:
                self.open(path, key, listener.tap, (len(value), len(listener.index)), value.device)
        output, replacement = tracked(output)
        copied = value.detach().clone()  # may be overwritten in place
        self.await_gradient(path, output, copied, partial(self._differentiate, path, module))
        return replacement

    def _differentiate(self, path: str, module: nn.Module, value: Tensor, gradient: Tensor) -> None:
        value, slope = functional.widened(value), functional.widened(gradient).flatten(1).unsqueeze(1)
        for listener in self._audience[path]:
            parts = [
                listener.tap.partial(channel_contributions(module, value, index, gradient.shape), slope)
                for index in listener.index.split(listener.tap.chunk)
            ]
            found = torch.cat(parts, 1)
            for key in listener.keys:
                self.seen[key].add(found, differentiated=True)
