"""What watches sites that are not simply a module's input or output, and its first kind: weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_prune.criteria import functional
from lightning_prune.criteria.base import Tap
from lightning_prune.errors import ScoreError


@dataclass
class Ledger:
    """What all watchers of one recorder write down together.

    Attributes:
        edges: what to differentiate with respect to in the current batch.
        differentiated: keys that ever got a gradient.
        without_grad: keys whose layers ran where no gradient can be taken.
    """

    edges: list[GradientEdge] = field(default_factory=list)
    differentiated: set[str] = field(default_factory=set)
    without_grad: set[str] = field(default_factory=set)


@dataclass
class Seen:
    """What one tap has seen for one key in the current batch; ``partial`` is (samples, channels)."""

    tap: Tap
    partial: Tensor
    positions: int = 0
    arrived: bool = False

    @property
    def samples(self) -> int:
        """What the gradient of a mean loss is multiplied by."""
        return len(self.partial)


class Watcher(ABC):
    """Sees one kind of site between `start` and `stop`."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.seen: dict[str, Seen] = {}
        self._handles: list[RemovableHandle] = []

    @abstractmethod
    def start(self) -> None:
        """Install hooks for a batch."""

    def stop(self) -> None:
        """Remove hooks and forget the batch."""
        while self._handles:
            self._handles.pop().remove()
        self.seen.clear()

    @property
    def on(self) -> bool:
        """Whether hooks are in place."""
        return bool(self._handles)

    def totals(self) -> Iterator[tuple[str, Seen]]:
        """What every key has seen in this batch."""
        yield from self.seen.items()


@dataclass(frozen=True, eq=False)
class Place:
    """Entries of one dimension of a weight that belong to the channels of a group."""

    tensor: str
    dim: int
    index: Tensor


def twice(where: str) -> ScoreError:
    """A second backward pass in one batch."""
    return ScoreError(f"{where}: more than one backward pass reached it in one batch; add the losses up first")


class WeightWatcher(Watcher):
    """Shows weights and their gradients to taps, once per batch.

    Sums of `Tap.joint` ones are `widths` wide.

    Frozen weights are made to take a gradient while a batch is open, and never keep it.
    """

    def __init__(self, ledger: Ledger, model: nn.Module) -> None:
        super().__init__(ledger)
        self._model = model
        self._audience: dict[str, list[tuple[str, Tap, Place]]] = {}
        self._thawed: list[nn.Parameter] = []
        self._arrived: set[str] = set()
        self._starts: dict[tuple[str, str], int] = {}
        self.widths: Counter[str] = Counter()

    def listen(self, key: str, tap: Tap, place: Place) -> None:
        """Let a tap see a weight; a key may have several.

        Raises:
            ScoreError: the model has no such parameter.
        """
        try:
            parameter = self._model.get_parameter(place.tensor)
        except AttributeError:
            raise ScoreError(f"the model has no parameter {place.tensor!r}; trace this model again") from None
        if tap.joint:
            self._starts[key, place.tensor] = self.widths[key]
            self.widths[key] += place.index.shape[1] * (parameter.numel() // parameter.shape[place.dim])
        self._audience.setdefault(place.tensor, []).append((key, tap, place))

    @override
    def start(self) -> None:
        for name, audience in self._audience.items():
            parameter = self._model.get_parameter(name)
            if not parameter.requires_grad:
                parameter.requires_grad_()
                self._thawed.append(parameter)
                self._handles.append(parameter.register_post_accumulate_grad_hook(_discard))
            self._handles.append(parameter.register_hook(partial(self._arrive, name, parameter)))
            self.ledger.edges.append(get_gradient_edge(parameter))
            for key, tap, place in audience:
                if key not in self.seen:
                    shape = (len(place.index), self.widths[key]) if tap.joint else (1, len(place.index))
                    empty = torch.zeros(shape, dtype=torch.float64, device=parameter.device)
                    self.seen[key] = Seen(tap, empty)

    @override
    def stop(self) -> None:
        super().stop()
        self._arrived.clear()
        while self._thawed:
            self._thawed.pop().requires_grad_(False)

    def _arrive(self, name: str, parameter: nn.Parameter, gradient: Tensor) -> None:
        if name in self._arrived:
            raise twice(name)
        self._arrived.add(name)
        with torch.no_grad(), torch.autocast(parameter.device.type, enabled=False):
            for key, tap, place in self._audience[name]:
                value, slope = (functional.by_position(t.detach()[None], place.dim + 1) for t in (parameter, gradient))
                seen = self.seen[key]
                found = tap.partial(value, slope)
                if tap.joint:
                    rows = found[place.index.to(found.device)].flatten(1)
                    start = self._starts[key, name]
                    seen.partial[:, start : start + rows.shape[1]] = rows
                else:
                    found = functional.gather_channels(found, place.index)
                    seen.partial = seen.partial + found.to(seen.partial.device)
                seen.arrived = True
                self.ledger.differentiated.add(key)


def _discard(parameter: Tensor) -> None:
    parameter.grad = None
