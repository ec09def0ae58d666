"""Watching weights and their gradients."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from lightning_prune.criteria import functional
from lightning_prune.criteria.base import Tap
from lightning_prune.criteria.channel_contributions import next_layers
from lightning_prune.criteria.observe.watcher import Watcher, key_of
from lightning_prune.errors import ScoreError
from lightning_prune.graph.computed_weights import effective_weight, follows_elementwise
from lightning_prune.graph.groups import Group


class WeightWatcher(Watcher):
    """Shows taps the weights of layers, or of the layers that read them, once per batch.

    Sums of `Tap.joint` ones are as wide as all weights of a channel. Frozen weights are made to take a gradient while a
    batch is open, and never keep it.
    """

    audience: dict[str, list[tuple[str, Tap, int, Tensor, int]]]

    def listen(self, group: Group, tap: Tap) -> None:
        readers = () if tap.site == "weight" else next_layers(self.model, group).values()
        looks = [(key_of(group, layer, tap), source) for layer in group.layers for source in readers or (layer,)]
        for key, source in dict.fromkeys(looks):
            if not follows_elementwise(self.model, source.weight):
                raise ScoreError(
                    f"{source.weight}: its layer's weight is computed from it and others, so that its gradient is not "
                    "that of the weight; use a criterion that looks at activations, such as Taylor, or remove what "
                    "computes the weight"
                )
            parameter = self.model.get_parameter(source.weight)
            start = self.shapes.get(key, (0, 0))[1] if tap.joint else 0
            width = source.index.shape[1] * (parameter.numel() // parameter.shape[source.dim])
            self.shapes[key] = (group.size, start + width) if tap.joint else (group.size,)
            self.audience.setdefault(source.weight, []).append((key, tap, source.dim, source.index, start))

    def start(self) -> None:
        for name, listeners in self.audience.items():
            parameter = self.model.get_parameter(name)
            if not parameter.requires_grad:
                parameter.requires_grad_()
                self.hooks.callback(parameter.requires_grad_, False)
                self.hooks.callback(parameter.register_post_accumulate_grad_hook(_discard).remove)
            for key, tap, _, index, _ in listeners:
                rows, columns = self.shapes[key] if tap.joint else (1, len(index))
                self.open(name, key, tap, (rows, columns), parameter.device)
            weight = effective_weight(self.model, name)
            self.await_gradient(name, parameter, weight, partial(self._arrive, name))

    def _arrive(self, name: str, weight: Tensor, gradient: Tensor) -> None:
        for key, tap, dim, index, start in self.audience[name]:
            value, slope = (functional.by_position(tensor[None], dim + 1) for tensor in (weight, gradient))
            found, (seen,) = tap.partial(value, slope), self.seen[key].values()
            if tap.joint:
                rows = found[index.to(found.device)].flatten(1)
                seen.partial[:, start : start + rows.shape[1]] = rows
                seen.differentiated = True
            else:
                seen.add(functional.gather_channels(found, index), differentiated=True)


def _discard(parameter: Tensor) -> None:
    parameter.grad = None
