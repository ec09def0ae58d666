"""Which channels may go so that the sizes in the model's Python code stay true.

A grid lets whole slices along one of its axes go. Which axis, and whether integer attributes of the module have to
follow, is chosen per module type by a `Choice`, tried out in `lightning_prune.graph.rehearse`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor

from lightning_prune.graph.constraints import CodeSize, Constraint, Grid, GroupedConvolution, Split
from lightning_prune.graph.label_space import Freeze, LabelSpace, Pairs, joined
from lightning_prune.graph.labels import NO_LABEL, ids_of

Layout = Grid | GroupedConvolution
ONE_SIZE = "goes together with others at one batch and image size only, as code lays it out"


class Choice(IntEnum):
    """How the sizes fixed in a module's code are met; each is tried when the one before it failed."""

    AS_IS = 0
    REPAIR = 1  # integer attributes of the module that equal an old size get the new one
    OTHER_AXIS = 2
    OTHER_AXIS_REPAIR = 3
    CODE_REPAIR = 4  # attributes that the code passes along get the new number, other numbers in it are replaced
    OTHER_AXIS_CODE_REPAIR = 5
    CODE = 6  # all numbers that the code passes along are replaced
    OTHER_AXIS_CODE = 7
    INPUTS = 8  # attributes that equal the number of channels that enter the module, too
    WIDTHS = 9  # and those that equal any that it sees, all of which then go together
    FROZEN = 10

    @property
    def repairs(self) -> bool:
        """Whether attributes of the module may be set."""
        return self in (Choice.REPAIR, Choice.OTHER_AXIS_REPAIR) or self.follows_widths

    @property
    def replaces_code(self) -> bool:
        """Whether numbers in the code are replaced, see `lightning_prune.model_state.code_sizes`."""
        return Choice.CODE_REPAIR <= self <= Choice.OTHER_AXIS_CODE

    @property
    def sets_attributes(self) -> bool:
        """Whether attributes that stand in the code are set, instead of replaced."""
        return self in (Choice.CODE_REPAIR, Choice.OTHER_AXIS_CODE_REPAIR)

    @property
    def follows_widths(self) -> bool:
        """Whether attributes may be set that no operator got, see `lightning_prune.graph.widths`."""
        return self in (Choice.INPUTS, Choice.WIDTHS)

    @property
    def rank(self) -> int:
        """Which axis is taken: 0, the one that leaves most channels free, or 1, the next."""
        return int(self.name.startswith("OTHER_AXIS"))


@dataclass
class Resolved:
    """What the constraints come to under certain choices."""

    joint: Tensor  # (ids,) the smallest id of each id's class
    frozen: list[Freeze] = field(default_factory=list)  # what has to stay on top of what the rules froze
    sizes: list[CodeSize] = field(default_factory=list)  # numbers that may have to follow
    splits: list[Split] = field(default_factory=list)  # those into uneven pieces
    axes: list[int] = field(default_factory=list)  # along which every grid loses slices, -1 where it is left as it is


def resolve(
    space: LabelSpace,
    choices: Mapping[str, Choice],
    sized: Collection[str] = (),
    pairs: Sequence[tuple[Tensor, Tensor]] = (),
    left: AbstractSet[str] = frozenset(),
    counted: AbstractSet[tuple[str, int]] = frozenset(),
) -> Resolved:
    """Tie channels until every grid loses whole slices only.

    choices: by module type, `Choice.AS_IS` if not named. sized: types whose layout holds at the traced size only.
    pairs: what else goes together. left: paths of modules that are left as they are, whatever their type. counted:
    numbers of channels that code of a type computes with, so that they stay.
    """
    state = Resolved(joined(space.classes(), pairs))
    grids: list[tuple[Layout, Choice]] = []
    untouched = 0
    for constraint in space.constraints:
        choice = _choice(constraint, choices, left, counted)
        if choice is Choice.FROZEN:
            untouched += 1
            if not isinstance(constraint, GroupedConvolution) and not constraint.exact:
                withheld = constraint.site.kind in sized
                why = ONE_SIZE if withheld else "has a size that is fixed in the Python code"
                reason = f"{why} around {constraint.site.where}"
                state.frozen.append(Freeze(constraint.distinct, reason, withheld=withheld))
                continue
        grid = constraint.grid() if isinstance(constraint, Split) else constraint
        if grid is not None:
            grids.append((grid, choice))
        elif isinstance(constraint, Split):
            # Uneven pieces lose channels freely, but only where their sizes are attributes that can follow.
            state.splits.append(constraint)
            in_code = choice.replaces_code and constraint.sizes_in_code(attributes=choice.sets_attributes)
            state.sizes += in_code or constraint.sizes()
    axes = _settle(state, grids, _consistent_from_the_start(space, grids))
    while pairs := _counted_together(state, grids, axes):
        state.joint = joined(state.joint, pairs)
        axes = _settle(state, grids, axes)
    state.axes = [*axes, *[-1] * untouched]
    for (grid, choice), axis in zip(grids, axes, strict=True):
        for rows in grid.together(axis):
            gaps = (rows == NO_LABEL).any(1)
            if gaps.any():
                reason = f"goes together with channels that stay in {grid.site.where}"
                state.frozen.append(Freeze(ids_of(rows[gaps]), reason))
        state.sizes += _sizes(grid, choice, axis)
    return state


def _choice(
    constraint: Constraint, choices: Mapping[str, Choice], left: AbstractSet[str], counted: AbstractSet[tuple[str, int]]
) -> Choice:
    if left and not left.isdisjoint(constraint.site.stack[:1]):
        return Choice.FROZEN
    if counted and any((constraint.site.kind, n) in counted for n in _extents(constraint)):
        return Choice.FROZEN
    return choices.get(constraint.site.kind, Choice.AS_IS)


def _sizes(grid: Layout, choice: Choice, axis: int) -> list[CodeSize]:
    """The numbers that follow if a grid is shortened along the axis."""
    if not choice.replaces_code or isinstance(grid, GroupedConvolution) or grid.exact:
        return grid.sizes(axis, repairs=choice.repairs)
    return grid.sizes_in_code(axis, attributes=choice.sets_attributes)


def _extents(constraint: Layout | Split) -> Sequence[int]:
    if isinstance(constraint, Split):
        return [end - start for start, end in constraint.intervals]
    return () if isinstance(constraint, GroupedConvolution) else constraint.ids.shape


def _counted_together(state: Resolved, grids: list[tuple[Layout, Choice]], axes: list[int]) -> Pairs:
    """What one number in the code counts that does not go together yet."""
    found = [size for (grid, choice), axis in zip(grids, axes, strict=True) for size in _sizes(grid, choice, axis)]
    first: dict[tuple[str, str, int], Tensor] = {}
    pairs: Pairs = []
    for size in (size for size in (*state.sizes, *found) if size.key is not None):
        ids = first.setdefault((size.site.stack[0], str(size.attribute or size.key), len(size.ids)), size.ids)
        both = (ids != NO_LABEL) & (size.ids != NO_LABEL)
        if not torch.equal(state.joint[ids[both]], state.joint[size.ids[both]]):
            pairs.append((ids[both], size.ids[both]))
    return pairs


def _consistent_from_the_start(space: LabelSpace, grids: list[tuple[Layout, Choice]]) -> list[int | None]:
    """Per grid the axis along which slices go together whatever is decided; found out once."""
    joint = space.classes()
    for grid, _ in grids:
        if grid not in space.consistent:
            space.consistent[grid] = _first_consistent(joint, grid, grid.order)
    return [space.consistent[grid] for grid, _ in grids]


def _first_consistent(joint: Tensor, grid: Layout, axes: Sequence[int]) -> int | None:
    return next((axis for axis in axes if _is_consistent(joint, grid.together(axis))), None)


def _settle(state: Resolved, grids: list[tuple[Layout, Choice]], consistent: Sequence[int | None]) -> list[int]:
    """The axis of every grid; ties grids of one kind at a time, since one tie may settle others.

    consistent: axes along which slices go together already, which more ties do not change.
    """
    axes = list(consistent)
    settled = [axis is not None for axis in axes]
    while True:
        kind = None
        pairs: Pairs = []
        for number, (grid, choice) in enumerate(grids):
            known = axes[number] if settled[number] else None
            before = grid.order if known is None else grid.order[: list(grid.order).index(known)]
            earlier = _first_consistent(state.joint, grid, before)
            if earlier is not None or known is not None:
                axes[number], settled[number] = known if earlier is None else earlier, True
                continue
            own = grid.site.where.split(" at ")[0], grid.site.kind
            kind = kind or own
            if kind == own:
                axis = axes[number]
                axes[number] = axis = grid.preferred(choice.rank) if axis is None else axis
                for rows in grid.together(axis):
                    labelled = rows != NO_LABEL
                    pairs.append((_first(rows)[labelled], rows[labelled]))
        if kind is None:
            return [axis for axis in axes if axis is not None]
        state.joint = joined(state.joint, pairs)


def _is_consistent(joint: Tensor, parts: list[Tensor]) -> bool:
    """Whether every row already belongs to one class. parts: (rows, entries) ids each."""
    for rows in parts:
        missing = rows == NO_LABEL
        classes = joint[rows]
        if missing.any():
            classes = torch.where(missing, NO_LABEL, classes)
            alike = (classes == _first(classes)) | missing
        else:
            alike = classes == classes[:, :1]
        if not alike.all():
            return False
    return True


def _first(rows: Tensor) -> Tensor:
    """One labelled entry of each row, for all of its entries."""
    return rows.amax(1, keepdim=True).expand_as(rows)
