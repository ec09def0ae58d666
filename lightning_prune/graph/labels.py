"""Channel labels: which slice of which parameter removes an element of a tensor, and what must go together.

Every parameter and buffer gets one integer id per slice of each of its dimensions. A *label layer* is an int64
tensor with the shape of the tensor it describes; its elements are ``2 * id + live`` (``live``: the element may
differ from zero when its channel is masked) or -1 where nothing removes the element. Dimensions along which a
layer does not vary have stride 0, so a layer costs as much as the channel count whatever the resolution; the
dimensions along which it does vary are its *signature*. A tensor may carry several layers with disjoint
signatures.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_prune.graph.constraints import Constraint, Size

NO_LABEL = -1


@dataclass(frozen=True)
class Info:
    """What is known of one tensor while the model runs.

    Attributes:
        layers: its label layers.
        data: it depends on the model's input, not on parameters alone.
        uniform: made by a factory (zeros, empty, ...): its extents follow those of the tensor it was made for.
    """

    layers: tuple[Tensor, ...] = ()
    data: bool = False
    uniform: bool = False


@dataclass(frozen=True)
class Span:
    """The ids of one dimension of one parameter or buffer: ``start .. start + size``."""

    tensor: str
    dim: int
    start: int
    size: int
    buffer: bool

    @property
    def ids(self) -> slice:
        """Where they lie in a tensor over all ids."""
        return slice(self.start, self.start + self.size)


Pairs = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Freeze:
    """Ids that must stay, and why. ``statistics``: their removal is possible, but changes a statistic."""

    ids: Tensor
    reason: str
    statistics: bool = False


@dataclass
class LabelSpace:
    """Hands out ids and collects what the rules say about them."""

    count: int = 0
    spans: list[Span] = field(default_factory=list)
    pairs: Pairs = field(default_factory=list)
    own_pairs: Pairs = field(default_factory=list)
    frozen: list[Freeze] = field(default_factory=list)
    constraints: list[Constraint] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)
    seen: set[tuple[object, ...]] = field(default_factory=set)
    _marks: dict[str, list[Tensor]] = field(default_factory=dict)
    _classes: dict[bool, Tensor] = field(default_factory=dict)

    def label_parameter(self, name: str, tensor: Tensor, *, buffer: bool, dims: int | None = None) -> Info:
        """One layer for every dimension of more than one slice. Buffers are not masked, hence live.

        Args:
            name: qualified name.
            tensor: a parameter or buffer.
            buffer: which of the two.
            dims: only the first so many dimensions (a convolution's kernel positions never go).
        """
        layers = []
        for dim, size in enumerate(tensor.shape[:dims]):
            if size < 2:
                continue  # a single slice can never be removed
            self.spans.append(Span(name, dim, self.count, size, buffer))
            values = self.fresh(size) * 2 + int(buffer)
            shape = [1] * tensor.dim()
            shape[dim] = size
            layers.append(values.view(shape).expand(tensor.shape))
        return Info(tuple(layers))

    def fresh(self, size: int) -> Tensor:
        """New ids; without a span they belong to no tensor (an addition's result, say)."""
        ids = torch.arange(self.count, self.count + size)
        self.count += size
        return ids

    def tie(self, first: Tensor, second: Tensor, *, own: bool = False) -> None:
        """Channels that go together. ``own``: they also belong to the same layer (a filter and its batch norm)."""
        (self.own_pairs if own else self.pairs).append((first.flatten(), second.flatten()))

    def freeze(self, values: Tensor, reason: str, *, statistics: bool = False) -> None:
        """Channels that must stay, and why. ``values`` are label values, -1 ignored."""
        ids = ids_of(values)
        if len(ids):
            self.frozen.append(Freeze(ids, reason, statistics))

    def mark(self, role: str, values: Tensor) -> None:
        """Remember a role of slices: ``filter``, ``reader`` or ``must_mask``."""
        self._marks.setdefault(role, []).append(ids_of(values))

    def classes(self, *, own: bool = False) -> Tensor:
        """(count,) the smallest id of the class each id belongs to, once everything is recorded."""
        if own not in self._classes:
            pairs = self.own_pairs if own else self.own_pairs + self.pairs
            first, second = (torch.cat([pair[side] for pair in pairs]) if pairs else torch.arange(0) for side in (0, 1))
            self._classes[own] = connected_components(self.count, first, second)
        return self._classes[own]

    def marked(self, role: str) -> Tensor:
        """Boolean mask over all ids."""
        mask = torch.zeros(self.count, dtype=torch.bool)
        for ids in self._marks.get(role, []):
            mask[ids] = True
        return mask


def connected_components(count: int, first: Tensor, second: Tensor) -> Tensor:
    """(count,) smallest member of every element's component, for the edges (first[i], second[i]).

    Example:
        >>> connected_components(5, torch.tensor([1, 4]), torch.tensor([0, 1])).tolist()
        [0, 0, 2, 3, 0]
    """
    parent = torch.arange(count)
    while True:
        a, b = parent[first], parent[second]
        apart = a != b
        if not apart.any():
            return parent
        first, second, a, b = first[apart], second[apart], a[apart], b[apart]
        parent.scatter_reduce_(0, torch.maximum(a, b), torch.minimum(a, b), "amin")
        while True:
            grand = parent[parent]
            if torch.equal(grand, parent):
                break
            parent = grand


def ids_of(values: Tensor) -> Tensor:
    """(n,) ids in label values, -1 left out; a stride-0 layer is not blown up."""
    values = region(values, signature(values)).flatten()
    return values[values >= 0] >> 1


def signature(layer: Tensor) -> tuple[int, ...]:
    """Dimensions along which a layer varies."""
    return tuple(
        d for d, (size, stride) in enumerate(zip(layer.shape, layer.stride(), strict=True)) if size > 1 and stride
    )


def region(layer: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The layer with every dimension but ``dims`` cut to one slice."""
    for dim in range(layer.dim()):
        if dim not in dims and layer.shape[dim] > 1:
            layer = layer.narrow(dim, 0, 1)
    return layer


def collapse(layer: Tensor) -> Tensor:
    """The same layer with stride 0 wherever nothing varies (operators that copy lose it)."""
    dims = signature(layer)
    core = region(layer, dims)
    for dim in dims:
        head = core.narrow(dim, 0, 1)
        if bool((core == head).all()):
            core = head
    return core.expand(layer.shape)


def spread(values: Tensor, shape: torch.Size, dim: int) -> Tensor:
    """A layer of ``shape`` that varies along ``dim`` only. values: (shape[dim],)."""
    view = [1] * len(shape)
    view[dim] = -1
    return values.view(view).expand(shape)
