"""Watching what each channel adds to the output of every layer that reads it, with the gradient there."""

from __future__ import annotations

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


class ReaderOutputWatcher(Watcher):
    """Shows taps what each channel adds to a reader's output, `Tap.chunk` channels at once.

    A copy of what enters the layer is held until its gradient arrives.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._audience: dict[str, list[tuple[list[str], Tap, Tensor]]] = {}

    @override
    def listen(self, group: Group, tap: Tap) -> None:
        keys = [key_of(group, layer, tap) for layer in group.layers]  # what is seen is the same for all
        self.shapes.update((key, (group.size,)) for key in keys)
        for path, reader in next_layers(self.model, group).items():
            check_computable(self.model, path, "NextLayerTaylor(form='weight'), or another criterion such as Taylor")
            self._audience.setdefault(path, []).append((keys, tap, reader.index))

    @override
    def start(self) -> None:
        self.hooks.enter_context(calls_of(self.model, self._audience, self._leave))

    def _leave(self, path: str, module: nn.Module, value: Any, output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            self.without_grad.update(key for keys, *_ in self._audience[path] for key in keys)
            return None
        check_batch(path, "input", module, value)
        for keys, tap, index in self._audience[path]:
            for key in keys:
                self.open(path, key, tap, (len(value), len(index)), value.device)
        output, replacement = tracked(output)
        copied = value.detach().clone()  # may be overwritten in place
        self.await_gradient(path, output, copied, partial(self._differentiate, path, module))
        return replacement

    def _differentiate(self, path: str, module: nn.Module, value: Tensor, gradient: Tensor) -> None:
        value, slope = functional.widened(value), functional.widened(gradient).flatten(1).unsqueeze(1)
        for keys, tap, index in self._audience[path]:
            chunks = (channel_contributions(module, value, some, gradient.shape) for some in index.split(tap.chunk))
            found = torch.cat([tap.partial(chunk, slope) for chunk in chunks], 1)
            for key in keys:
                self.seen[key].add(found, differentiated=True)
