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

from lightning_prune.graph.constraints import CodeSize, Grid, GroupedConvolution, Split
from lightning_prune.graph.label_space import Freeze, LabelSpace, Pairs, connected_components
from lightning_prune.graph.labels import NO_LABEL, ids_of

Layout = Grid | GroupedConvolution
ONE_SIZE = "goes together with others at one batch and image size only, as code lays it out"


class Choice(IntEnum):
    """How the sizes fixed in a module's code are met; each is tried when the one before it failed."""

    AS_IS = 0
    REPAIR = 1  # integer attributes of the module that equal an old size get the new one
    OTHER_AXIS = 2
    OTHER_AXIS_REPAIR = 3
    CODE = 4  # numbers that the code passes along are read from an attribute instead
    OTHER_AXIS_CODE = 5
    INPUTS = 6  # attributes that equal the number of channels that enter the module, too
    WIDTHS = 7  # and those that equal any that it sees, all of which then go together
    FROZEN = 8

    @property
    def repairs(self) -> bool:
        """Whether attributes of the module may be set."""
        return self in (Choice.REPAIR, Choice.OTHER_AXIS_REPAIR) or self.follows_widths

    @property
    def replaces_code(self) -> bool:
        """Whether numbers in the code are replaced, see `lightning_prune.model_state.code_sizes`."""
        return self in (Choice.CODE, Choice.OTHER_AXIS_CODE)

    @property
    def follows_widths(self) -> bool:
        """Whether attributes may be set that no operator got, see `lightning_prune.graph.widths`."""
        return self in (Choice.INPUTS, Choice.WIDTHS)

    @property
    def rank(self) -> int:
        """Which axis is taken: 0, the one that leaves most channels free, or 1, the next."""
        return int(self in (Choice.OTHER_AXIS, Choice.OTHER_AXIS_REPAIR, Choice.OTHER_AXIS_CODE))


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
) -> Resolved:
    """Tie channels until every grid loses whole slices only.

    choices: by module type, `Choice.AS_IS` if not named. sized: types whose layout holds at the traced size only.
    pairs: what else goes together. left: paths of modules that are left as they are, whatever their type.
    """
    state = Resolved(_joined(space.classes(), pairs))
    grids: list[tuple[Layout, Choice]] = []
    untouched = 0
    for constraint in space.constraints:
        choice = choices.get(constraint.site.kind, Choice.AS_IS)
        if left and not left.isdisjoint(constraint.site.stack[:1]):
            choice = Choice.FROZEN
        if choice is Choice.FROZEN:
            untouched += 1
            if not isinstance(constraint, GroupedConvolution) and not constraint.exact:
                withheld = constraint.site.kind in sized
                why = ONE_SIZE if withheld else "has a size that is fixed in the Python code"
                reason = f"{why} around {constraint.site.where}"
                state.frozen.append(Freeze(ids_of(constraint.ids), reason, withheld=withheld))
                continue
        grid = constraint.grid() if isinstance(constraint, Split) else constraint
        if grid is not None:
            grids.append((grid, choice))
        elif isinstance(constraint, Split):
            # Uneven pieces lose channels freely, but only where their sizes are attributes that can follow.
            state.splits.append(constraint)
            state.sizes += constraint.sizes_in_code() if choice.replaces_code else constraint.sizes()
    axes = _settle(state, grids)
    while pairs := _counted_together(state, grids, axes):
        state.joint = _joined(state.joint, pairs)
        axes = _settle(state, grids)
    state.axes = [*axes, *[-1] * untouched]
    for (grid, choice), axis in zip(grids, axes, strict=True):
        for rows in grid.rows(axis):
            gaps = (rows == NO_LABEL).any(1)
            if gaps.any():
                reason = f"goes together with channels that stay in {grid.site.where}"
                state.frozen.append(Freeze(ids_of(rows[gaps]), reason))
        state.sizes += grid.sizes_in_code(axis) if choice.replaces_code else grid.sizes(axis, repairs=choice.repairs)
    return state


def _counted_together(state: Resolved, grids: list[tuple[Layout, Choice]], axes: list[int]) -> Pairs:
    """What one number in the code counts that does not go together yet."""
    found = [size for size in state.sizes if size.key is not None]
    found += [
        size for (grid, choice), axis in zip(grids, axes, strict=True) if choice.replaces_code
        for size in grid.sizes_in_code(axis)
    ]  # fmt: skip
    first: dict[tuple[str, str, int], Tensor] = {}
    pairs: Pairs = []
    for size in found:
        ids = first.setdefault((size.site.stack[0], str(size.key), len(size.ids)), size.ids)
        both = (ids != NO_LABEL) & (size.ids != NO_LABEL)
        if not torch.equal(state.joint[ids[both]], state.joint[size.ids[both]]):
            pairs.append((ids[both], size.ids[both]))
    return pairs


def _settle(state: Resolved, grids: list[tuple[Layout, Choice]]) -> list[int]:
    """The axis of every grid; ties grids of one kind at a time, since one tie may settle others."""
    axes = [-1] * len(grids)
    while True:
        kind = None
        pairs: Pairs = []
        for number, (grid, choice) in enumerate(grids):
            consistent = next((axis for axis in grid.order if _is_consistent(state.joint, grid.rows(axis))), None)
            if consistent is not None:
                axes[number] = consistent
                continue
            own = grid.site.where.split(" at ")[0], grid.site.kind
            kind = kind or own
            if kind == own:
                axes[number] = axes[number] if axes[number] >= 0 else grid.preferred(choice.rank)
                for rows in grid.rows(axes[number]):
                    labelled = rows != NO_LABEL
                    pairs.append((_first(rows)[labelled], rows[labelled]))
        if kind is None:
            return axes
        state.joint = _joined(state.joint, pairs)


def _joined(joint: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Classes, once these pairs go together too."""
    if not pairs:
        return joint
    ids = torch.arange(len(joint))
    first, second = torch.cat([ids, *(a for a, _ in pairs)]), torch.cat([joint, *(b for _, b in pairs)])
    return connected_components(len(ids), first, second)


def _is_consistent(joint: Tensor, parts: list[Tensor]) -> bool:
    """Whether every row already belongs to one class. parts: (rows, entries) ids each."""
    for rows in parts:
        classes = torch.where(rows == NO_LABEL, NO_LABEL, joint[rows])
        if not ((classes == _first(classes)) | (rows == NO_LABEL)).all():
            return False
    return True


def _first(rows: Tensor) -> Tensor:
    """One labelled entry of each row, for all of its entries."""
    return rows.amax(1, keepdim=True).expand_as(rows)
