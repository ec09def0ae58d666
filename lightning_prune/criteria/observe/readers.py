"""Watching the layers that read the channels of a group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from typing_extensions import override

from lightning_prune.criteria import functional
from lightning_prune.criteria.base import Tap
from lightning_prune.criteria.channel_contributions import channel_effects, computable, first_input, input_dim
from lightning_prune.criteria.observe.watching import Ledger, Place, Seen, Watcher, twice
from lightning_prune.errors import ScoreError
from lightning_prune.graph.groups import Group


def readers_of(model: nn.Module, group: Group) -> dict[str, Place]:
    """Convolutions and linear layers that read the channels of a group, by module path.

    Raises:
        ScoreError: there is none, or one computes its weight from other parameters (weight norm).
    """
    found = {}
    for part in group.slices:
        path, _, attribute = part.tensor.rpartition(".")
        if part.layer is None and part.dim == 1 and (attribute == "weight_v" or ".parametrizations." in part.tensor):
            raise ScoreError(
                f"{part.tensor}: a layer whose weight is computed from other parameters reads channels, which is not "
                "supported here; remove the parametrisation, or use another criterion, such as Taylor"
            )
        if attribute == "weight" and part.layer is None and input_dim(model.get_submodule(path)) == part.dim:
            found[path] = Place(part.tensor, part.dim, part.index)
    if not found:
        raise ScoreError(
            f"{group.name}: no convolution or linear layer reads its channels, so there is no next layer to score by; "
            "use another criterion, such as Taylor"
        )
    return found


@dataclass(frozen=True, eq=False)
class _Listener:
    """One tap on one reader: the same for all layers of a group, whose keys these are."""

    keys: tuple[str, ...]
    tap: Tap
    index: Tensor


class ReaderWatcher(Watcher):
    """Shows taps what each channel adds to the output of every layer that reads it, with the gradient there.

    A copy of what enters the layer is held until its gradient arrives; then `Tap.chunk` channels are looked at
    at once.
    """

    def __init__(self, ledger: Ledger, model: nn.Module) -> None:
        super().__init__(ledger)
        self._model = model
        self._audience: dict[str, list[_Listener]] = {}

    def listen(self, keys: Sequence[str], tap: Tap, path: str, place: Place) -> None:
        """Let a tap see a reader.

        Raises:
            ScoreError: its output is not what torch's own layer makes of its weight.
        """
        computable(self._model, path, "NextLayerTaylor(form='weight'), or another criterion such as Taylor")
        self._audience.setdefault(path, []).append(_Listener(tuple(keys), tap, place.index))

    @override
    def start(self) -> None:
        for path, listeners in self._audience.items():
            hook = partial(self._leave, path, listeners)
            self._handles.append(self._model.get_submodule(path).register_forward_hook(hook, with_kwargs=True))

    def _leave(
        self,
        path: str,
        listeners: list[_Listener],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> Tensor | None:
        if torch._C._current_graph_task_id() != -1:
            return None  # activation checkpointing repeats the forward pass inside the backward pass
        if not torch.is_grad_enabled():
            self.ledger.without_grad.update(key for listener in listeners for key in listener.keys)
            return None
        value = first_input(args, kwargs)
        weight_dims = module.weight.ndim if isinstance(module.weight, Tensor) else 0
        if value.ndim < 2 or (weight_dims > 2 and value.ndim != weight_dims):
            raise ScoreError(f"{path}: its input has shape {list(value.shape)}; a batch dimension is needed")
        for listener in listeners:
            self._open(path, listener, value)
        replacement = None
        tracked = output
        if not output.requires_grad:  # all upstream is frozen; what goes on may be overwritten in place
            tracked = output.detach().requires_grad_()
            replacement = tracked.clone()
        held = [value.detach().clone()]  # may be overwritten in place
        tracked.register_hook(partial(self._arrive, path, listeners, module, held))
        self.ledger.edges.append(get_gradient_edge(tracked))
        return replacement

    def _open(self, path: str, listener: _Listener, value: Tensor) -> None:
        for key in listener.keys:
            seen = self.seen.get(key)
            if seen is None:
                empty = torch.zeros(len(value), len(listener.index), dtype=torch.float64, device=value.device)
                self.seen[key] = Seen(listener.tap, empty)
            elif seen.samples != len(value):
                raise ScoreError(
                    f"{path}: called with {len(value)} samples where another layer that reads the same channels, or "
                    f"another call, has {seen.samples}, which cannot be added up; use another criterion, such as Taylor"
                )

    def _arrive(
        self, path: str, listeners: list[_Listener], module: nn.Module, held: list[Tensor], gradient: Tensor
    ) -> None:
        if not self.on:
            return  # a backward pass after the batch was closed
        if not held:
            raise twice(path)
        value = functional.widened(held.pop())
        with torch.no_grad(), torch.autocast(value.device.type, enabled=False):
            slope = functional.widened(gradient.detach()).flatten(1).unsqueeze(1)
            for listener in listeners:
                found = torch.cat(
                    [
                        listener.tap.partial(channel_effects(module, value, index, gradient.shape), slope)
                        for index in listener.index.split(listener.tap.chunk)
                    ],
                    1,
                )
                for key in listener.keys:
                    seen = self.seen[key]
                    seen.partial = seen.partial + found.to(seen.partial.device)
                    seen.arrived = True
                    self.ledger.differentiated.add(key)
