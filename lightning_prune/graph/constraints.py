"""Channels whose number the model's Python code relies on.

A view that splits channels into (heads, width), a chunk, a grouped convolution: their sizes are integers that no
tracer sees through. Rules record them as constraints; `lightning_prune.graph.resolve` says which channels may go so
that the sizes stay true. All tensors here hold label ids, -1 for none.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from lightning_prune.graph.code_arguments import SourceCall
from lightning_prune.graph.labels import NO_LABEL, ids_of
from lightning_prune.model_state.code_sizes import SourceArgument

MANY = 4096  # ids, from which on repeated ones are left out


@dataclass(frozen=True)
class CallSite:
    """Where an operator ran."""

    stack: tuple[str, ...]  # module paths, innermost first
    kind: str  # type of the innermost module; all modules of one type run the same code
    where: str  # operator and module path, for messages


def kind_of(owner: type) -> str:
    """A module type by its full name."""
    return f"{owner.__module__}.{owner.__qualname__}"


@dataclass(frozen=True, eq=False)
class CodeSize:
    """A number in the model's Python code: how many entries, ids (size,), a labelled dimension has."""

    ids: Tensor
    site: CallSite
    attribute: str | None = None  # of the module that holds it; None: any attribute of that value
    position: int | None = None  # its place in a list or tuple of sizes
    listed: tuple[int, ...] = ()  # the whole list, if it is one of a list
    item: bool = False  # any item of any list may be it, too
    key: str | None = None  # of the place in the code that gives it


@dataclass(frozen=True, eq=False)
class Grid:
    """Channels (s1, ..., sk) laid out by the code: whole slices along one of ``axes`` may go."""

    ids: Tensor
    axes: tuple[int, ...]
    site: CallSite
    exact: bool = False  # the layout is known (group norm), not read off one run: nothing to choose
    attribute: str | None = None  # of the innermost module, that counts the slices along ``axes[0]``
    made: CallSite | None = None  # of channels that the code made of nothing: where it did
    call: SourceCall | None = None  # the call in the code that lays them out
    dims: tuple[int | None, ...] = ()  # of its result, for each of the grid's; None: each size is that of a piece
    rank: int = 0  # how many dimensions the result has

    @property
    def order(self) -> list[int]:
        """Axes, the one with most slices first."""
        return sorted(self.axes, key=lambda axis: -self.ids.shape[axis])

    def preferred(self, rank: int) -> int:
        """The axis to shorten: 0, that which leaves most channels free, or 1, the next."""
        return self.order[min(rank, len(self.axes) - 1)]

    def rows(self, axis: int) -> list[Tensor]:
        """What goes together if the axis is shortened, one row for each of its slices."""
        return [self.ids.movedim(axis, 0).reshape(self.ids.shape[axis], -1)]

    @cached_property
    def distinct(self) -> Tensor:
        """(n,) the ids in it, each once."""
        return ids_of(self.ids).unique()

    def together(self, axis: int) -> list[Tensor]:
        """As `rows`, each column once: many say the same where channels lie at thousands of positions."""
        if axis not in self._together:
            self._together[axis] = [
                rows if rows.numel() < MANY else torch.unique(rows, dim=1) for rows in self.rows(axis)
            ]
        return self._together[axis]

    @cached_property
    def _together(self) -> dict[int, list[Tensor]]:
        return {}

    def sizes(self, axis: int, *, repairs: bool) -> list[CodeSize]:
        """The numbers that follow if the axis is shortened. ``repairs``: also those that are only guessed."""
        slices = self.rows(axis)[0][:, 0]
        if self.exact:
            return [CodeSize(slices, self.site, self.attribute)] if self.attribute else []
        if not repairs:
            return []
        sizes = [CodeSize(slices, self.site), CodeSize(self.ids.flatten(), self.site)]
        sizes += [CodeSize(slices, self.made, item=True)] if self.made else []
        if 0 < axis == self.ids.dim() - 1:
            listed = (len(slices),) * (self.ids.numel() // len(slices))
            sizes += [CodeSize(slices, self.site, position=k, listed=listed) for k in range(len(listed))]
        return sizes

    def sizes_in_code(self, axis: int, *, attributes: bool) -> list[CodeSize]:
        """The numbers that the code passes along, if the axis is shortened: that one follows, the others stay.

        attributes: an attribute of the module that the code passes gets the new number itself.
        """
        if self.call is None or self.exact:
            return []
        slices = self.rows(axis)[0][:, 0]
        if None in self.dims:
            return [size_at(place, slices, self.site, attributes) for place in self.call.places().values()]
        found = []
        for k, dim in enumerate(self.dims):
            place = None if dim is None else self.call.place(dim, self.rank)
            along = self.rows(k)[0][:, 0]
            if place is None or (k != axis and not place.is_computed):
                continue
            # ``c * h * w``, ``n * heads``: a channel is there once for each position, or sample, whose number is free.
            if place.is_computed and (k != axis or "*" in place.text) and len(along.unique()) < len(along):
                continue
            if k == axis or not (attributes and place.attribute):
                ids = slices if k == axis else torch.full_like(along, NO_LABEL)
                found.append(size_at(place, ids, self.site, attributes))
        return found


@dataclass(frozen=True, eq=False)
class GroupedConvolution:
    """A grouped convolution: whole groups go (axis 0), or the same position of every group (axis 1)."""

    reads: Tensor  # (groups, i) ids of its input
    inner: Tensor  # (i,) of the weight's input dimension, shared by all groups
    makes: Tensor  # (groups, o) of its output
    site: CallSite
    order: ClassVar[tuple[int, ...]] = (0, 1)

    def preferred(self, _rank: int) -> int:
        """The axis with more slices."""
        groups, width = self.reads.shape
        return 0 if groups > width else 1

    def rows(self, axis: int) -> list[Tensor]:
        """What goes together if the axis is shortened."""
        if axis == 0:
            return [torch.cat([self.reads, self.makes], 1)]
        return [torch.cat([self.reads, self.inner[None]], 0).t(), self.makes.t()]

    def together(self, axis: int) -> list[Tensor]:
        """As `rows`."""
        return self.rows(axis)

    def sizes(self, axis: int, *, repairs: bool) -> list[CodeSize]:  # noqa: ARG002
        """The numbers that follow if the axis is shortened."""
        return [CodeSize(self.reads[:, 0], self.site, attribute="groups")] if axis == 0 else []


@dataclass(eq=False)
class Split:
    """Slices of a labelled dimension, ids (n,), at fixed places."""

    ids: Tensor
    site: CallSite
    intervals: list[tuple[int, int]]  # (start, end) of every piece that was taken
    listed: bool = False  # they were given as one list of sizes
    call: SourceCall | None = None  # the call in the code that gives it
    exact: ClassVar[bool] = False

    @cached_property
    def distinct(self) -> Tensor:
        """(n,) the ids in it, each once."""
        return ids_of(self.ids).unique()

    def grid(self) -> Grid | None:
        """The same as a grid, if the pieces divide the dimension evenly."""
        bounds = tuple(sorted({0, len(self.ids), *itertools.chain(*self.intervals)}))
        if bounds not in self._grids:
            self._grids[bounds] = self._grid(bounds)
        return self._grids[bounds]

    @cached_property
    def _grids(self) -> dict[tuple[int, ...], Grid | None]:
        return {}

    def _grid(self, bounds: tuple[int, ...]) -> Grid | None:
        lengths = {end - start for start, end in itertools.pairwise(bounds)}
        if len(lengths) > 1:
            return None
        return Grid(self.ids.view(len(bounds) - 1, -1), (1,), self.site, call=self.call, dims=(None, None))

    def sizes_in_code(self, *, attributes: bool = False) -> list[CodeSize]:
        """The numbers that the code passes along."""
        places = self.call.places() if self.call is not None and self.listed else {}
        pieces = [self.ids[start:end] for start, end in self.intervals]
        return [size_at(places[k], ids, self.site, attributes) for k, ids in enumerate(pieces) if k in places]

    def sizes(self) -> list[CodeSize]:
        """The numbers that may say where the pieces lie."""
        ranges = sorted({bounds for piece in self.intervals for bounds in piece_and_lead(*piece)})
        lengths = tuple(end - start for start, end in self.intervals) if self.listed else ()
        pieces = [self.ids[start:end] for start, end in self.intervals] if self.listed else []
        sizes = [CodeSize(ids, self.site, position=k, listed=lengths) for k, ids in enumerate(pieces)]
        return sizes + [CodeSize(self.ids[start:end], self.site) for start, end in ranges]


def size_at(place: SourceArgument, ids: Tensor, site: CallSite, attributes: bool) -> CodeSize:
    """The number that the code passes there: of an attribute, or to be replaced in the code."""
    return CodeSize(ids, site, place.attribute if attributes else None, key=place.key)


def piece_and_lead(start: int, end: int) -> list[tuple[int, int]]:
    """The ranges whose lengths may place a piece: itself, what lies before it, and both; without empty ones."""
    return [(a, b) for a, b in ((start, end), (0, start), (0, end)) if a < b]


Constraint = Grid | GroupedConvolution | Split
