"""Channels whose number the model's Python code relies on, and what may go so that its sizes stay true.

A view that splits channels into (heads, width), a chunk, a grouped convolution: their sizes are integers that no
tracer sees through. A *grid* lays such channels out; only whole slices along one of its axes may go. Which axis,
and whether an integer attribute of the module has to follow, is chosen per module type by a `Choice`, tried out in
`lightning_prune.graph.rehearse`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor

from lightning_prune.graph.labels import (
    NO_LABEL,
    Freeze,
    LabelSpace,
    Pairs,
    connected_components,
    ids_of,
)


class Choice(IntEnum):
    """How the sizes fixed in a module's code are met; each is tried when the one before it failed."""

    AS_IS = 0
    REPAIR = 1  # integer attributes of the module that equal an old size get the new one
    OTHER_AXIS = 2
    OTHER_AXIS_REPAIR = 3
    FROZEN = 4

    @property
    def repairs(self) -> bool:
        """Whether attributes of the module may be set."""
        return self in (Choice.REPAIR, Choice.OTHER_AXIS_REPAIR)

    @property
    def rank(self) -> int:
        """Which axis is taken: 0, the one that leaves most channels free, or 1, the next."""
        return int(self in (Choice.OTHER_AXIS, Choice.OTHER_AXIS_REPAIR))


@dataclass(frozen=True)
class Place:
    """Where an operator ran.

    Attributes:
        stack: module paths, innermost first.
        kind: type of the innermost module; all modules of one type run the same code.
        where: operator and module path, for messages.
    """

    stack: tuple[str, ...]
    kind: str
    where: str


@dataclass(frozen=True, eq=False)
class Size:
    """A number in the model's Python code: the entries of a labelled dimension, (size,) label values."""

    values: Tensor
    place: Place
    attribute: str | None = None  # known by name; None: any attribute of that value
    position: int | None = None  # in a list or tuple
    whole: tuple[int, ...] = ()  # the whole list, if it is one of a list


@dataclass(frozen=True, eq=False)
class Grid:
    """Channels laid out over several dimensions: whole slices along one of ``axes`` may go.

    Attributes:
        values: (s1, ..., sk) label values.
        axes: dimensions that may get shorter.
        place: who lays them out.
        exact: the layout is known (group norm), not read off one run: nothing to choose.
        attribute: attribute of the innermost module that counts the slices along ``axes[0]``.
    """

    values: Tensor
    axes: tuple[int, ...]
    place: Place
    exact: bool = False
    attribute: str | None = None

    def order(self) -> list[int]:
        """Axes, the one with most slices first."""
        return sorted(self.axes, key=lambda axis: -self.values.shape[axis])


@dataclass(frozen=True, eq=False)
class Grouped:
    """A grouped convolution: whole groups go, or the same position of every group.

    Attributes:
        reads: (groups, i) label values of its input.
        inner: (i,) of the weight's input dimension, shared by all groups.
        makes: (groups, o) of its output.
    """

    reads: Tensor
    inner: Tensor
    makes: Tensor
    place: Place


@dataclass(frozen=True, eq=False)
class Merge:
    """A reshape or expansion to a size that may be written in the code.

    Attributes:
        values: (n,) label values of the labelled dimension.
    """

    values: Tensor
    place: Place


@dataclass(eq=False)
class Cut:
    """Slices of a labelled dimension at fixed places.

    Attributes:
        values: (n,) label values.
        intervals: (start, end) of every piece that was taken.
        listed: they were given as one list of sizes.
    """

    values: Tensor
    place: Place
    intervals: list[tuple[int, int]] = field(default_factory=list)
    listed: bool = False

    def equal_parts(self) -> int:
        """Number of pieces if the cuts divide the dimension evenly, else 0."""
        bounds = sorted({0, len(self.values), *(bound for interval in self.intervals for bound in interval)})
        lengths = {end - start for start, end in itertools.pairwise(bounds)}
        return len(bounds) - 1 if len(lengths) == 1 else 0


Constraint = Grid | Grouped | Merge | Cut


@dataclass
class Resolved:
    """What the constraints come to under certain choices.

    Attributes:
        joint: (ids,) the smallest id of each id's class.
        frozen: what has to stay on top of what the rules froze.
        sizes: numbers that may have to follow.
        active: constraints whose sizes are read off one run, so that only running tells.
        axes: which axis every grid loses slices along, -1 where it is left as it is.
    """

    joint: Tensor
    frozen: list[Freeze]
    sizes: list[Size]
    active: list[Constraint]
    axes: tuple[int, ...] = ()


def resolve(space: LabelSpace, constraints: Sequence[Constraint], choices: dict[str, Choice]) -> Resolved:
    """Tie channels until every grid loses whole slices only.

    Args:
        space: what the rules said.
        constraints: in the order they were met.
        choices: by module type; `Choice.AS_IS` if not named.
    """
    state = Resolved(space.classes(), [], [], [])
    grids: list[tuple[Grid | Grouped, Choice]] = []
    for constraint in constraints:
        choice = choices.get(constraint.place.kind, Choice.AS_IS)
        if isinstance(constraint, Grouped) or (isinstance(constraint, Grid) and constraint.exact):
            grids.append((constraint, choice))
        elif choice is Choice.FROZEN:
            _freeze_all(state, constraint)
        elif isinstance(constraint, Grid):
            grids.append((constraint, choice))
        elif isinstance(constraint, Merge):
            if choice.repairs:
                state.sizes.append(Size(constraint.values, constraint.place))
        elif parts := constraint.equal_parts():
            grids.append((Grid(constraint.values.view(parts, -1), (1,), constraint.place), choice))
        else:
            # Uneven pieces lose channels freely, but only where their sizes are attributes that can follow.
            state.active.append(constraint)
            state.sizes += _cut_sizes(constraint)
    axes = _settle(state, grids)
    for (grid, choice), axis in zip(grids, axes, strict=True):
        _finish(state, grid, choice, axis)
    frozen = tuple(c for c in constraints if choices.get(c.place.kind, Choice.AS_IS) is Choice.FROZEN)
    state.axes = (*axes, *(-1 for _ in frozen))
    return state


def _settle(state: Resolved, grids: list[tuple[Grid | Grouped, Choice]]) -> list[int]:
    """The axis of every grid; ties grids of one kind at a time, since one tie may settle others."""
    axes = [-1] * len(grids)
    while True:
        kind = None
        pairs: Pairs = []
        for number, (grid, choice) in enumerate(grids):
            consistent = _consistent_axis(state.joint, grid)
            if consistent is not None:
                axes[number] = consistent
                continue
            if kind is None:
                kind = grid.place.where.split(" at ")[0], grid.place.kind
            if kind == (grid.place.where.split(" at ")[0], grid.place.kind):
                axes[number] = axes[number] if axes[number] >= 0 else _preferred_axis(grid, choice)
                pairs += _ties(grid, axes[number])
        if kind is None:
            return axes
        ids = torch.arange(len(state.joint))
        state.joint = connected_components(
            len(ids), torch.cat([ids, *(a for a, _ in pairs)]), torch.cat([state.joint, *(b for _, b in pairs)])
        )


def _consistent_axis(joint: Tensor, grid: Grid | Grouped) -> int | None:
    """The axis along which classes already are whole slices."""
    if isinstance(grid, Grouped):
        return next(
            (axis for axis in (0, 1) if all(_is_whole(joint, rows) for rows in _grouped_rows(grid, axis))), None
        )
    return next((axis for axis in grid.order() if _is_whole(joint, _rows(grid.values, axis))), None)


def _is_whole(joint: Tensor, rows: Tensor) -> bool:
    """rows: (slices, entries) label values: does every slice belong to one class?"""
    classes = torch.where(rows == NO_LABEL, NO_LABEL, joint[rows >> 1])
    first = classes.amax(1, keepdim=True)
    return bool(((classes == first) | (rows == NO_LABEL)).all())


def _rows(values: Tensor, axis: int) -> Tensor:
    return values.movedim(axis, 0).reshape(values.shape[axis], -1)


def _grouped_rows(grid: Grouped, axis: int) -> list[Tensor]:
    """Entries that go together, one row each."""
    if axis == 0:
        return [torch.cat([grid.reads, grid.makes], 1)]
    return [torch.cat([grid.reads, grid.inner[None]], 0).t(), grid.makes.t()]


def _preferred_axis(grid: Grid | Grouped, choice: Choice) -> int:
    if isinstance(grid, Grouped):
        groups, width = grid.reads.shape
        return 0 if groups > width else 1
    order = grid.order()
    return order[min(choice.rank, len(order) - 1)]


def _ties(grid: Grid | Grouped, axis: int) -> Pairs:
    parts = _grouped_rows(grid, axis) if isinstance(grid, Grouped) else [_rows(grid.values, axis)]
    pairs = []
    for rows in parts:
        first = rows.amax(1, keepdim=True).expand_as(rows)
        labelled = rows != NO_LABEL
        pairs.append((first[labelled] >> 1, rows[labelled] >> 1))
    return pairs


def _finish(state: Resolved, grid: Grid | Grouped, choice: Choice, axis: int) -> None:
    """Freeze slices with gaps; note which numbers follow."""
    parts = _grouped_rows(grid, axis) if isinstance(grid, Grouped) else [_rows(grid.values, axis)]
    for rows in parts:
        gaps = (rows == NO_LABEL).any(1)
        if gaps.any():
            state.frozen.append(
                Freeze(ids_of(rows[gaps]), f"goes together with channels that stay in {grid.place.where}")
            )
    if isinstance(grid, Grouped):
        if axis == 0:
            state.sizes.append(Size(grid.reads[:, 0], grid.place, attribute="groups"))
        return
    values = _rows(grid.values, axis)[:, 0]
    if grid.exact:
        if grid.attribute:
            state.sizes.append(Size(values, grid.place, attribute=grid.attribute))
        return
    state.active.append(grid)
    if choice.repairs:
        state.sizes += [Size(values, grid.place), Size(grid.values.flatten(), grid.place)]
        if axis == grid.values.dim() - 1:
            listed = (len(values),) * (grid.values.numel() // len(values))
            state.sizes += [Size(values, grid.place, position=k, whole=listed) for k in range(len(listed))]


def _cut_sizes(cut: Cut) -> list[Size]:
    if cut.listed:
        whole = tuple(end - start for start, end in cut.intervals)
        listed = [
            Size(cut.values[start:end], cut.place, position=k, whole=whole)
            for k, (start, end) in enumerate(cut.intervals)
        ]
    else:
        listed = []
    ranges = {r for start, end in cut.intervals for r in ((start, end), (0, start), (0, end)) if r[0] < r[1]}
    return listed + [Size(cut.values[start:end], cut.place) for start, end in sorted(ranges)]


def _freeze_all(state: Resolved, constraint: Grid | Merge | Cut) -> None:
    reason = f"has a size that is fixed in the Python code around {constraint.place.where}"
    state.frozen.append(Freeze(ids_of(constraint.values), reason))
