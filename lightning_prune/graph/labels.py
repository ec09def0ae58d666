"""Channel labels of one tensor: which slice of which parameter removes each of its elements.

Every parameter and buffer gets one integer id per slice of each of its dimensions
(`lightning_prune.graph.label_space`). `Labels` have the shape of the tensor they describe; what moves the tensor's
elements is executed on them too. Dimensions along which nothing varies have stride 0, so labels cost as much as there
are channels, whatever the resolution. A tensor may carry several labels that vary along different dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_prune.graph.constraints import CallSite

NO_LABEL = -1
_FLAGS = {flag: torch.tensor(flag) for flag in (False, True)}


class Labels:
    """For every element of a tensor the id of the slice whose removal removes it, -1 where nothing does.

    ``live``, of the same shape or one for all: whether an element may differ from zero when its channel is masked.
    """

    def __init__(self, ids: Tensor, live: Tensor | bool = False, dims: tuple[int, ...] | None = None) -> None:
        """Dims: along which the ids vary, where that is known."""
        self.ids = ids
        self.live = _FLAGS[live] if isinstance(live, bool) else live
        self.dims = varying(ids) if dims is None else dims
        if self.live.dim():
            flags = varying(self.live)
            self.live = self.live if flags else self.live[(0,) * self.live.dim()]
            self.dims = tuple(sorted({*self.dims, *flags}))

    @classmethod
    def along(cls, vector: Labels, shape: Sequence[int], dim: int) -> Labels:
        """Labels of ``shape`` that vary along ``dim`` only. vector: (shape[dim],)."""
        if vector.live.dim():
            return vector.map(lambda t: t.view([-1 if d == dim else 1 for d in range(len(shape))]).expand(shape))
        ids, strides = vector.ids, [0] * len(shape)
        strides[dim] = ids.stride(0) if vector.dims else 0
        laid = ids.as_strided(shape, strides, ids.storage_offset())
        return Labels(laid, vector.live, (dim,) if vector.dims else ())

    @classmethod
    def joined(cls, parts: Sequence[Labels], dim: int = 0) -> Labels:
        """Concatenated along a dimension."""
        live = torch.cat([part.live.expand(part.ids.shape) for part in parts], dim)
        return Labels(collapse(torch.cat([part.ids for part in parts], dim)), collapse(live))

    def map(self, function: Callable[[Tensor], Tensor]) -> Labels:
        """The same change of layout to ids and live."""
        return Labels(function(self.ids), function(self.live) if self.live.dim() else self.live)

    def moved(self, move: Callable[[Tensor], Tensor]) -> Labels:
        """What an operator that only moves elements makes of them."""
        return self.pieces(lambda tensor: [move(tensor)])[0]

    def pieces(self, move: Callable[[Tensor], Sequence[Tensor]]) -> list[Labels]:
        """`moved` for an operator with several results."""
        # detach: an in-place transposition must not turn the labels that others share.
        ids = move(self.ids.detach())
        live = [collapse(t) for t in move(self.live.detach())] if self.live.dim() else [self.live] * len(ids)
        return [Labels(collapse(one), flag) for one, flag in zip(ids, live, strict=True)]

    def region(self, dims: Sequence[int] | None = None) -> Labels:
        """Every dimension but ``dims`` (default: those along which they vary) cut to one slice."""
        dims = self.dims if dims is None else dims
        if self.live.dim():
            return self.map(lambda tensor: region(tensor, dims))
        return Labels(region(self.ids, dims), self.live, tuple(d for d in self.dims if d in dims))

    def flat(self) -> Labels:
        """(n,) one label for each that varies."""
        if self.live.dim() or len(self.dims) != 1:
            return self.region().map(torch.flatten)
        ids, (dim,) = self.ids, self.dims
        return Labels(ids.as_strided((ids.shape[dim],), (ids.stride(dim),), ids.storage_offset()), self.live, (0,))

    def expand(self, shape: Sequence[int]) -> Labels:
        """Broadcast to a shape."""
        if self.ids.shape == shape:
            return self
        if self.live.dim():
            return self.map(lambda tensor: tensor.expand(shape))
        more = len(shape) - self.ids.dim()
        return Labels(self.ids.expand(shape), self.live, tuple(d + more for d in self.dims))

    def where(self, mask: Tensor) -> Labels:
        """(n,) those under a mask of the same shape."""
        return self.map(lambda tensor: tensor[mask])

    def constant(self) -> Labels:
        """After what gives no zero even for a masked channel."""
        return Labels(self.ids, True, None if self.live.dim() else self.dims)

    def equal(self, other: Labels) -> bool:
        """Whether both say the same of every element."""
        return torch.equal(self.ids, other.ids) and bool((self.live == other.live).all())


@dataclass(frozen=True, eq=False)
class Zeros:
    """Where the code made a tensor of zeros, and the labels of that whose shape it has, if any."""

    site: CallSite
    like: tuple[Labels, ...] = ()


@dataclass(frozen=True, eq=False)
class TensorInfo:
    """What is known of one tensor while the model runs."""

    labels: tuple[Labels, ...] = ()  # each varies along other dimensions
    data: bool = False  # it depends on the model's input, not on parameters alone
    uniform: bool = False  # made by a factory (zeros, empty, ...): extents follow those of the tensor it was made for
    zeros: Zeros | None = None  # all of it is zero

    def with_labels(self, labels: Iterable[Labels]) -> TensorInfo:
        """The same with other labels; any that do not vary are left out."""
        zeros = self.zeros and Zeros(self.zeros.site)
        return replace(self, labels=tuple(one for one in labels if one.dims), zeros=zeros)

    def moved(self, move: Callable[[Tensor], Tensor]) -> TensorInfo:
        """After an operator that only moves elements."""
        found = self.with_labels(one.moved(move) for one in self.labels)
        if self.zeros is None or not self.zeros.like:
            return found
        return replace(found, zeros=replace(self.zeros, like=tuple(one.moved(move) for one in self.zeros.like)))


def varying(tensor: Tensor) -> tuple[int, ...]:
    """Dimensions along which it has memory of its own."""
    return tuple(
        d for d, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)) if size > 1 and stride
    )


def region(tensor: Tensor, dims: Sequence[int]) -> Tensor:
    """A tensor with every dimension but ``dims`` cut to one slice."""
    shape = [size if dim in dims else min(size, 1) for dim, size in enumerate(tensor.shape)]
    return tensor.as_strided(shape, tensor.stride(), tensor.storage_offset())


def collapse(tensor: Tensor) -> Tensor:
    """The same with stride 0 wherever nothing varies (operators that copy lose it)."""
    dims = varying(tensor)
    core = region(tensor, dims)
    for dim in dims:
        head = core.narrow(dim, 0, 1)
        if bool((core == head).all()):
            core = head
    return core.expand(tensor.shape)


def ids_of(ids: Tensor) -> Tensor:
    """(n,) ids in labels, -1 left out; what has stride 0 is not blown up."""
    found = region(ids, varying(ids)).flatten()
    return found[found >= 0]
