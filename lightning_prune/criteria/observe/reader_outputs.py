"""Watching what each channel adds to the outputs of every layer that reads it: all, with the gradient, or some."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.criteria import functional
from lightning_prune.criteria.base import Tap
from lightning_prune.criteria.channel_contributions import (
    channel_contributions,
    check_computable,
    next_layers,
    sampled_contributions,
)
from lightning_prune.criteria.observe.watcher import Watcher, check_batch, exactly, key_of, tracked
from lightning_prune.graph.groups import Group
from lightning_prune.graph.readers import Reader


class ReaderOutputWatcher(Watcher):
    """Shows taps what each channel adds to a reader's output, `Tap.chunk` channels at once.

    A copy of what enters the layer is held until its gradient arrives.
    """

    audience: dict[str, list[tuple[list[str], Tap, Tensor]]]

    def listen(self, group: Group, tap: Tap) -> None:
        keys = [key_of(group, layer, tap) for layer in group.layers]  # what is seen is the same for all
        self.shapes.update((key, (group.size,)) for key in keys)
        for path, reader in next_layers(self.model, group).items():
            check_computable(self.model, path, "NextLayerTaylor(form='weight'), or another criterion such as Taylor")
            self.audience.setdefault(path, []).append((keys, tap, reader.index))

    def see(self, path: str, module: nn.Module, value: Any, output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            self.without_grad.update(key for keys, *_ in self.audience[path] for key in keys)
            return None
        check_batch(path, "input", module, value)
        for keys, tap, index in self.audience[path]:
            for key in keys:
                self.open(path, key, tap, (len(value), len(index)), value.device)
        output, replacement = tracked(output)
        copied = value.detach().clone()  # may be overwritten in place
        self.await_gradient(path, output, copied, partial(self._differentiate, path, module))
        return replacement

    def _differentiate(self, path: str, module: nn.Module, value: Tensor, gradient: Tensor) -> None:
        value, slope = functional.widened(value), functional.widened(gradient).flatten(1).unsqueeze(1)
        for keys, tap, index in self.audience[path]:
            chunks = (channel_contributions(module, value, some, gradient.shape) for some in index.split(tap.chunk))
            found = torch.cat([tap.partial(chunk, slope) for chunk in chunks], 1)
            for key in keys:
                self.seen[key][len(found)].add(found, differentiated=True)


class SampledOutputWatcher(Watcher):
    """Shows taps `Tap.rows` outputs of every sample, of every layer that reads a group, split by channel.

    Which outputs is fixed by `Tap.seed`, the key, the reader, and the number of samples that it has seen: neither by
    the global random state nor by how samples are split into batches.
    """

    audience: dict[str, list[tuple[str, Tap, Tensor]]]

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._generators: dict[tuple[str, str, int], torch.Generator] = {}
        self._calls: Counter[str] = Counter()

    def listen(self, group: Group, tap: Tap) -> None:
        for reader in next_layers(self.model, group).values():
            self.look(key_of(group, group.layers[0], tap), tap, reader)

    def look(self, key: str, tap: Tap, reader: Reader) -> None:
        """Let a tap see a reader; a key may have several."""
        check_computable(self.model, reader.path, "another criterion, such as Taylor")
        self.audience.setdefault(reader.path, []).append((key, tap, reader.index))
        self.shapes[key] = (len(reader.index), len(reader.index))

    def start(self) -> None:
        self._calls.clear()
        super().start()

    def see(self, path: str, module: nn.Module, value: Any, output: Tensor) -> None:
        check_batch(path, "input", module, value)
        call = self._calls[path]
        self._calls[path] += 1
        with exactly(value):
            value = functional.widened(value.detach())
            for key, tap, index in self.audience[path]:
                chosen = self._draw(key, tap, path, call, output.shape).to(value.device)
                seen = self.open(path, key, tap, (len(index), len(index)), value.device)
                for rows in sampled_contributions(module, value, index, output.shape, chosen):
                    seen.add(tap.partial(rows, None), len(rows))

    def _draw(self, key: str, tap: Tap, path: str, call: int, shape: torch.Size) -> Tensor:
        """Outputs of every sample, (N, rows)."""
        outputs = math.prod(shape[1:])
        if tap.rows is None:
            return torch.arange(outputs).expand(shape[0], -1)
        if (key, path, call) not in self._generators:
            self._generators[key, path, call] = functional.mixed_generator(tap.seed, key, path, call)
        return torch.randint(outputs, (shape[0], tap.rows), generator=self._generators[key, path, call])
