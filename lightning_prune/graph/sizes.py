"""Which integer attributes of which modules are the sizes that the constraints speak of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_prune.graph.channel_graph import SizeAttribute
from lightning_prune.graph.constraints import CodeSize, Split, piece_and_lead
from lightning_prune.graph.label_space import Freeze, Pairs
from lightning_prune.graph.labels import NO_LABEL, ids_of
from lightning_prune.model_state.code_sizes import SIZES
from lightning_prune.model_state.cutting import sizes_of

Key = tuple[str, str, int | str | None]  # module path, attribute, position


def match(modules: Mapping[str, nn.Module], sizes: Sequence[CodeSize]) -> dict[Key, list[Tensor]]:
    """The attributes that have these values: (size,) ids that each counts, more than one if ambiguous."""
    found: dict[Key, list[Tensor]] = {}
    called: dict[Key, list[Tensor]] = {}  # by modules without such an attribute, which may mean another number
    for size in sizes:
        for key, ids in _attributes(modules, size):
            known = (found if key[0] in size.site.stack[:1] else called).setdefault(key, [])
            if not any(torch.equal(ids, other) for other in known):
                known.append(ids)
    return {**called, **found}


def unread(
    modules: Mapping[str, nn.Module], splits: Sequence[Split], found: Mapping[Key, list[Tensor]]
) -> dict[Key, list[Tensor]]:
    """Attributes of modules whose own code cuts pieces of that length, though no run has read them.

    Code for another occasion may: ultralytics' blocks chunk in two, and for export split by ``self.c``.
    """
    grids = [grid for split in splits if (grid := split.grid()) is not None]
    pieces = match(
        modules, [CodeSize(grid.rows(1)[0][:, 0], replace(grid.site, stack=grid.site.stack[:1])) for grid in grids]
    )
    return {key: ids for key, ids in pieces.items() if key not in found}


def _attributes(modules: Mapping[str, nn.Module], size: CodeSize) -> list[tuple[Key, Tensor]]:
    stack = size.site.stack
    if size.key is not None:
        own = sizes_of(modules[stack[0]]) if stack[0] in modules else {}
        if size.attribute is None:
            return [((stack[0], SIZES, size.key), size.ids)] if stack[0] in modules else []
        return [((stack[0], size.attribute, None), size.ids)] if own.get(size.attribute) == len(size.ids) else []
    if size.attribute is not None:
        path = stack[0] if stack else ""
        value = getattr(modules.get(path), size.attribute, None)
        # Instance norm sees the channels of every image one after the other.
        if isinstance(value, int) and value and len(size.ids) % value == 0:
            return [((path, size.attribute, None), size.ids[:value])]
    wanted = len(size.ids) if size.position is None else size.listed
    own_code = [path for path in stack if path in modules and not is_torch(modules[path])]
    for path in own_code[:2]:  # the module whose code ran, or the one that called it
        if keys := _holding(modules[path], path, size, wanted):
            return [(key, size.ids) for key in keys]
    children = [
        (f"{path}.{name}".lstrip("."), of) for path in own_code[:1] for name, of in modules[path].named_children()
    ]
    held = (_holding(child, path, size, wanted) for path, child in children if path in modules and not is_torch(child))
    return [(key, size.ids) for keys in held for key in keys]


def _holding(module: nn.Module, path: str, size: CodeSize, wanted: int | tuple[int, ...]) -> list[Key]:
    known = {name: tuple(of) if isinstance(of, list) else of for name, of in sizes_of(module).items()}
    known = {name: value for name, value in known.items() if not name.startswith("_")}
    keys: list[Key] = [(path, name, size.position) for name, value in known.items() if value == wanted]
    if size.item:
        lists = [(name, value) for name, value in known.items() if isinstance(value, tuple)]
        keys += [(path, name, k) for name, value in lists for k, item in enumerate(value) if item == wanted]
    return keys


def counted_together(modules: Mapping[str, nn.Module], sizes: Sequence[CodeSize]) -> Pairs:
    """What has to go together so that each attribute counts the same channels wherever it is one of these sizes."""
    several = match(modules, sizes).values()
    pairs = [(ids[0], other) for ids in several for other in ids[1:]]
    return [(a[both], b[both]) for a, b in pairs for both in [(a != NO_LABEL) & (b != NO_LABEL)]]


def is_torch(module: nn.Module) -> bool:
    """Whether it is one of torch's own, whose code passes no sizes of the user's."""
    return type(module).__module__.startswith("torch.nn.")


def match_splits(
    modules: Mapping[str, nn.Module], splits: Sequence[Split], found: dict[Key, list[Tensor]]
) -> list[Freeze]:
    """Uneven pieces whose sizes are no module's attributes: numbers in the code that can follow, or those that stay."""
    for split in _unmatched(splits, found):
        for key, several in match(modules, split.sizes_in_code()).items():
            found.setdefault(key, []).extend(several)
    uncounted = _unmatched(splits, found)
    return [Freeze(ids_of(split.ids), f"is cut at fixed places by {split.site.where}") for split in uncounted]


def _unmatched(splits: Sequence[Split], found: Mapping[Key, list[Tensor]]) -> list[Split]:
    counted = {tuple(ids.tolist()) for several in found.values() for ids in several}

    def is_free(start: int, end: int, ids: Tensor) -> bool:
        return all(tuple(ids[a:b].tolist()) not in counted for a, b in piece_and_lead(start, end))

    return [
        split for split in splits
        if any(is_free(*piece, split.ids) for piece in split.intervals if piece[1] - piece[0] < len(split.ids))
    ]  # fmt: skip


def attributes(found: Mapping[Key, list[Tensor]], joint: Tensor, channels: Mapping[str, Tensor]) -> list[SizeAttribute]:
    """In terms of groups and their channels (classes); ambiguous ones only if all count the same channels."""
    if not found:
        return []
    names = list(channels)
    group_of = torch.full((len(joint),), -1)
    place_of = torch.zeros(len(joint), dtype=torch.int64)
    for number, name in enumerate(names):
        group_of[channels[name]] = number
        place_of[channels[name]] = torch.arange(len(channels[name]))

    def sources(ids: Tensor) -> dict[str, Tensor]:
        roots = joint[ids[ids != NO_LABEL]]
        groups = group_of[roots]
        return {names[k]: place_of[roots[groups == k]] for k in groups.unique().tolist() if k >= 0}

    result = []
    for key, several in found.items():
        several = [ids for ids in several if sources(ids)] or several  # what stays is no reason to tell them apart
        counts = [sources(ids) for ids in several]
        fixed = [len(ids) - sum(map(len, counted.values())) for ids, counted in zip(several, counts, strict=True)]
        alike = [{name: places.sort().values.tolist() for name, places in counted.items()} for counted in counts]
        if (counts[0] or key[1] == SIZES) and alike == alike[:1] * len(alike) and len(set(fixed)) == 1:
            result.append(SizeAttribute(*key, counts[0], fixed[0]))
    return result
