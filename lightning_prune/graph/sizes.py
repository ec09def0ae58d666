"""Which integer attributes of which modules are the sizes that the constraints speak of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_prune.graph.constraints import Cut, Size
from lightning_prune.graph.groups import SizeAttribute
from lightning_prune.graph.labels import NO_LABEL, Freeze, ids_of
from lightning_prune.model_state.cutting import sizes_of

Key = tuple[str, str, int | None]  # module path, attribute, position


def match(modules: Mapping[str, nn.Module], sizes: Sequence[Size]) -> dict[Key, list[Tensor]]:
    """The attributes that have these values: (size,) label values that each counts, more than one if ambiguous."""
    found: dict[Key, list[Tensor]] = {}
    for size in sizes:
        for key, values in _attributes(modules, size):
            known = found.setdefault(key, [])
            if not any(torch.equal(values, other) for other in known):
                known.append(values)
    return found


def _attributes(modules: Mapping[str, nn.Module], size: Size) -> list[tuple[Key, Tensor]]:
    if size.attribute is not None:
        path = size.place.stack[0] if size.place.stack else ""
        value = getattr(modules.get(path), size.attribute, None)
        # Instance norm sees the channels of every image one after the other.
        if isinstance(value, int) and value and len(size.values) % value == 0:
            return [((path, size.attribute, None), size.values[:value])]
    own_code = [path for path in size.place.stack if not _is_torch(modules.get(path))]
    for path in own_code[:2]:  # the module whose code ran, or the one that called it
        public = {name: value for name, value in sizes_of(modules[path]).items() if not name.startswith("_")}
        if size.position is None:
            keys: list[Key] = [(path, name, None) for name, value in public.items() if value == len(size.values)]
        else:
            keys = [(path, name, size.position) for name, value in public.items() if _is_list(value, size.whole)]
        if keys:
            return [(key, size.values) for key in keys]
    return []


def _is_torch(module: nn.Module | None) -> bool:
    return module is None or type(module).__module__.startswith("torch.nn.")


def _is_list(value: object, whole: tuple[int, ...]) -> bool:
    return isinstance(value, (list, tuple)) and tuple(value) == whole


def unmatched(cuts: Sequence[Cut], found: Mapping[Key, list[Tensor]]) -> list[Freeze]:
    """Uneven pieces whose sizes are no module's attributes: nothing can tell the code that they shrank."""
    counted = {tuple(values.tolist()) for several in found.values() for values in several}
    frozen = []
    for cut in cuts:
        for start, end in cut.intervals:
            if end - start < len(cut.values) and not any(
                tuple(cut.values[a:b].tolist()) in counted for a, b in ((start, end), (0, start), (0, end)) if a < b
            ):
                frozen.append(Freeze(ids_of(cut.values), f"is cut at fixed places by {cut.place.where}"))
                break
    return frozen


def attributes(found: Mapping[Key, list[Tensor]], joint: Tensor, channels: Mapping[str, Tensor]) -> list[SizeAttribute]:
    """In terms of groups and their channels.

    Args:
        found: from `match`; ambiguous ones are left out unless all count the same channels.
        joint: (ids,) class of every id.
        channels: the classes of every group's channels.
    """
    names = list(channels)
    group_of = torch.full((len(joint),), -1)
    place_of = torch.zeros(len(joint), dtype=torch.int64)
    for number, name in enumerate(names):
        group_of[channels[name]] = number
        place_of[channels[name]] = torch.arange(len(channels[name]))

    def sources(values: Tensor) -> tuple[dict[str, Tensor], int]:
        roots = joint[values[values != NO_LABEL] >> 1]
        groups = group_of[roots]
        counted = {names[k]: place_of[roots[groups == k]] for k in groups.unique().tolist() if k >= 0}
        return counted, len(values) - sum(len(places) for places in counted.values())

    result = []
    for (module, attribute, position), several in found.items():
        counts = [sources(values) for values in several]
        if any(not _same(counts[0], other) for other in counts[1:]):
            continue
        counted, fixed = counts[0]
        if counted:
            result.append(SizeAttribute(module, attribute, position, counted, fixed))
    return result


def _same(first: tuple[dict[str, Tensor], int], second: tuple[dict[str, Tensor], int]) -> bool:
    return (
        first[1] == second[1]
        and first[0].keys() == second[0].keys()
        and all(torch.equal(first[0][k].sort().values, second[0][k].sort().values) for k in first[0])
    )
