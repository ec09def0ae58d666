"""Watching what each channel adds to outputs, drawn at random, of the layers that read it."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from typing_extensions import override

from lightning_prune.criteria import functional
from lightning_prune.criteria.base import Tap
from lightning_prune.criteria.channel_contributions import (
    channel_contributions,
    check_computable,
    next_layers,
    windows,
)
from lightning_prune.criteria.observe.hooks import calls_of
from lightning_prune.criteria.observe.watcher import Watcher, check_batch, exactly, key_of
from lightning_prune.graph.groups import Group
from lightning_prune.graph.readers import Reader

_ELEMENTS = 2**21  # of the largest tensor made at once: 16 MiB in float64


class SampledOutputWatcher(Watcher):
    """Shows taps `Tap.rows` outputs of every sample, of every layer that reads a group, split by channel.

    Which outputs is fixed by `Tap.seed`, the key, the reader, and the number of samples that it has seen: neither by
    the global random state nor by how samples are split into batches.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._audience: dict[str, list[tuple[str, Tap, Tensor]]] = {}
        self._generators: dict[tuple[str, str, int], torch.Generator] = {}
        self._calls: Counter[str] = Counter()

    @override
    def listen(self, group: Group, tap: Tap) -> None:
        for reader in next_layers(self.model, group).values():
            self.look(key_of(group, group.layers[0], tap), tap, reader)

    def look(self, key: str, tap: Tap, reader: Reader) -> None:
        """Let a tap see a reader; a key may have several."""
        check_computable(self.model, reader.path, "another criterion, such as Taylor")
        self._audience.setdefault(reader.path, []).append((key, tap, reader.index))
        self.shapes[key] = (len(reader.index), len(reader.index))

    @override
    def start(self) -> None:
        self._calls.clear()
        self.hooks.enter_context(calls_of(self.model, self._audience, self._leave))

    def _leave(self, path: str, module: nn.Module, value: Any, output: Tensor) -> None:
        check_batch(path, "input", module, value)
        call = self._calls[path]
        self._calls[path] += 1
        with exactly(value):
            value = functional.widened(value.detach())
            for key, tap, index in self._audience[path]:
                chosen = self._draw(key, tap, path, call, output.shape).to(value.device)
                seen = self.open(path, key, tap, (len(index), len(index)), value.device)
                for rows in sampled_contributions(module, value, index, output.shape, chosen):
                    seen.add(tap.partial(rows, None), len(rows))

    def _draw(self, key: str, tap: Tap, path: str, call: int, shape: torch.Size) -> Tensor:
        """Outputs of every sample, (N, rows)."""
        outputs = math.prod(shape[1:])
        if tap.rows is None:
            return torch.arange(outputs).expand(shape[0], -1)
        generator = self._generators.get((key, path, call))
        if generator is None:
            # The CPU generator sees 32 bits of its seed: they have to be mixed, not concatenated.
            digest = hashlib.sha256(f"{tap.seed}/{key}/{path}/{call}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
            self._generators[key, path, call] = generator
        return torch.randint(outputs, (shape[0], tap.rows), generator=generator)


def sampled_contributions(
    module: nn.Module, inputs: Tensor, index: Tensor, output: torch.Size, chosen: Tensor
) -> Iterator[Tensor]:
    """What each channel adds to chosen outputs of a layer, bias left out: some (rows, channels) after others.

    Only the windows behind the chosen outputs are looked at; no tensor has more than about two million elements.

    Args:
        module: a convolution or linear layer.
        inputs: what entered it.
        index: (channels, r) entries of its weight's input dimension that belong to each channel.
        output: shape of what it returned.
        chosen: (N, rows) outputs of each sample, as positions in its flattened output.

    Example:
        >>> layer = nn.Conv2d(4, 3, 3)
        >>> images = torch.randn(2, 4, 5, 5)
        >>> outputs = layer(images)
        >>> each, first = torch.arange(4).unsqueeze(1), torch.zeros(2, 1, dtype=torch.int64)
        >>> (rows,) = sampled_contributions(layer, images, each, outputs.shape, first)
        >>> rows.shape, torch.allclose(rows.sum(1) + layer.bias[0], outputs[:, 0, 0, 0], atol=1e-5)
        (torch.Size([2, 4]), True)
    """
    index = index.to(inputs.device)
    if isinstance(module, _ConvTransposeNd):
        parts = [
            channel_contributions(module, inputs, some, output).gather(2, chosen.unsqueeze(1).expand(-1, len(some), -1))
            for some in index.split(max(1, _ELEMENTS // math.prod(output)))
        ]
        yield torch.cat(parts, 1).transpose(1, 2).flatten(0, 1)
        return
    layer: Any = module
    weight = layer.weight.detach().to(inputs.dtype)
    seen = windows(layer, inputs) if isinstance(module, _ConvNd) else inputs.reshape(len(inputs), -1, inputs.shape[-1])
    limit = max(1, _ELEMENTS // (math.prod(weight.shape[2:]) * index.numel()))
    samples = torch.arange(len(inputs), device=inputs.device).repeat_interleave(chosen.shape[1])
    for sample, row in zip(samples.split(limit), chosen.flatten().split(limit), strict=True):
        if isinstance(module, _ConvNd):
            out, *place = torch.unravel_index(row, output[1:])
            group = out // (weight.shape[0] // module.groups)
            entries = group[:, None, None] * weight.shape[1] + index  # rows, channels, r
            where = (sample[:, None, None], entries, *(at[:, None, None] for at in place))
            values = seen[where].flatten(3)
            yield (values * weight.flatten(2)[out][:, index]).sum((-2, -1))
        else:
            place, out = row // output[-1], row % output[-1]
            yield (seen[sample, place][:, index] * weight[out][:, index]).sum(-1)
