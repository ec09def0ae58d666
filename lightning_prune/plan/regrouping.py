"""The graph of a reconstructed model in the groups of the dense one, so that a plan of the dense model goes on."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_prune.errors import NoEffectWarning
from lightning_prune.graph import ChannelGraph, Group, Layer, Slice
from lightning_prune.graph.channel_graph import SizeAttribute
from lightning_prune.plan.plan import Plan

Channel = tuple[str, int]  # a group, and which of its channels
Places = dict[tuple[str, int], dict[int, Channel]]  # by weight and dimension: whose each filter is
TIED = "has channels that go only with those of other groups, now that there are fewer"
NEW = "is no group of the dense model"


def groups_left(dense: ChannelGraph, built: Plan) -> list[Group]:
    """The dense groups with the channels they have left, numbered as in the reconstructed model.

    Args:
        dense: of the dense model.
        built: what it has lost.
    """
    kept = {(cut.tensor, cut.dim): cut.keep for cut in dense.cuts(built.channels_removed)}

    def now(tensor: str, dim: int, index: Tensor) -> Tensor:
        keep = kept.get((tensor, dim))
        return index if keep is None else torch.searchsorted(keep, index)

    groups = []
    for group in dense.groups:
        left = torch.tensor(built.groups[group.name].keep if group.name in built.groups else range(group.size))
        slices = [replace(part, index=now(part.tensor, part.dim, part.index[left])) for part in group.slices]
        layers = [
            replace(layer, index=now(layer.weight, layer.dim, layer.index[left]), reader=None, reader_index=None)
            for layer in group.layers
        ]
        groups.append(replace(group, size=len(left), layers=tuple(layers), slices=tuple(slices)))
    return groups


def in_dense_groups(graph: ChannelGraph, left: Sequence[Group]) -> ChannelGraph:
    """The graph of a reconstructed model, its channels in the groups of the dense model that they belonged to.

    A trace of the smaller model may divide them otherwise: groups that share a layer are named by the filters they
    hold, which move up as others go; and channels may be tied more closely. A group that cannot be put together again
    keeps what it has, with the reason.

    Args:
        graph: of the model as it is now, traced with ``known=left``.
        left: from `groups_left`.
    """
    places, sizes = _places(graph), {group.name: group.size for group in graph.groups}
    made_of = {group.name: (group, _made_of(group, places, sizes)) for group in left}
    owners: dict[Channel, list[Channel]] = defaultdict(list)
    for name, (_, channels) in made_of.items():
        for position, parts in enumerate(channels):
            for part in parts:
                owners[part].append((name, position))
    groups = [_together(group, channels, graph, owners) for group, channels in made_of.values()]
    for group in graph.groups:
        if rest := [channel for channel in range(group.size) if (group.name, channel) not in owners]:
            name = f"{group.name} (new)" if group.name in made_of else group.name
            groups.append(replace(_rows_of(group, torch.tensor(rest)[:, None]), name=name, reason=group.reason or NEW))
            owners.update({(group.name, channel): [(name, position)] for position, channel in enumerate(rest)})
    return replace(
        graph,
        groups=tuple(groups),
        sizes=tuple(_size(size, owners) for size in graph.sizes),
        means=tuple(replace(mean, counted=_size(mean.counted, owners)) for mean in graph.means),
    )


def keeping_fixed(plan: Plan, graph: ChannelGraph, built: Plan) -> Plan:
    """The plan without what it removes from groups that can lose nothing more in the smaller model; warns of them.

    Args:
        plan: in the channels of the dense model.
        graph: of the model as it is now, from `in_dense_groups`.
        built: what it has lost.
    """
    fixed = {group.name: group.reason for group in graph.groups if not group.prunable and group.name in plan.groups}
    had = {name: len(built.groups[name].keep) if name in built.groups else plan.groups[name].size for name in fixed}
    stuck = [name for name in fixed if len(plan.groups[name].keep) < had[name]]
    for name in stuck:
        message = f"group {name!r} keeps the {had[name]} channels it has left: it {fixed[name]}"
        warnings.warn(message, NoEffectWarning, stacklevel=3)
    return plan.keeping(stuck, built)


def _made_of(group: Group, places: Places, sizes: Mapping[str, int]) -> list[set[Channel]]:
    """For each channel of a dense group the channels of a graph that have its filters; empty: some are not there."""
    found: list[set[Channel]] = [set() for _ in range(group.size)]
    for layer in group.layers:
        numbers = places.get((layer.weight, layer.dim), {})
        for parts, filters in zip(found, layer.index.tolist(), strict=True):
            if any(number not in numbers for number in filters):  # a weight of another name, as in narrower attention
                same = sizes.get(group.name) == group.size
                return [{(group.name, channel)} if same else set() for channel in range(group.size)]
            parts.update(numbers[number] for number in filters)
    return found


def _places(graph: ChannelGraph) -> Places:
    """By weight and dimension: the channel that each filter belongs to."""
    places: Places = defaultdict(dict)
    for group in graph.groups:
        for layer in group.layers:
            for channel, filters in enumerate(layer.index.tolist()):
                places[layer.weight, layer.dim].update(dict.fromkeys(filters, (group.name, channel)))
    return places


def _together(
    group: Group, made_of: list[set[Channel]], graph: ChannelGraph, owners: Mapping[Channel, list[Channel]]
) -> Group:
    """A dense group put together from the groups of a graph that its channels have come to."""
    rows: dict[str, list[list[int]]] = defaultdict(lambda: [[] for _ in made_of])
    for position, parts in enumerate(made_of):
        for name, channel in sorted(parts):
            rows[name][position].append(channel)
    found = [graph.group(name) for name in rows]
    alone = all(len(owners[part]) == 1 for parts in made_of for part in parts)
    if not (found and alone and all(len({len(row) for row in of}) == 1 for of in rows.values())):
        return replace(group, reason=next(filter(None, (part.reason for part in found)), TIED))
    pieces = [_rows_of(part, torch.tensor(of)) for part, of in zip(found, rows.values(), strict=True)]
    return replace(
        next((piece for piece in pieces if not piece.prunable), pieces[0]),
        name=group.name,
        layers=tuple(_joined_layers(layer for piece in pieces for layer in piece.layers)),
        slices=tuple(_joined_slices(part for piece in pieces for part in piece.slices)),
    )


def _rows_of(group: Group, rows: Tensor) -> Group:
    """Channels, each made of m channels that a group has: rows (channels, m)."""

    def of(index: Tensor) -> Tensor:
        return index[rows].flatten(1)

    layers = []
    for layer in group.layers:
        readers = None if layer.reader_index is None else of(layer.reader_index)
        layers.append(replace(layer, index=of(layer.index), reader_index=readers))
    slices = (replace(part, index=of(part.index)) for part in group.slices)
    return replace(group, size=len(rows), layers=tuple(layers), slices=tuple(slices))


def _joined_layers(layers: Iterable[Layer]) -> list[Layer]:
    """Parts of one layer as one."""
    joined: dict[tuple[str, int], Layer] = {}
    for layer in layers:
        key = layer.weight, layer.dim
        if key not in joined:
            joined[key] = layer
            continue
        index, reader_index = torch.cat([joined[key].index, layer.index], 1), None
        if (first := joined[key].reader_index) is not None and layer.reader_index is not None:
            reader_index = torch.cat([first, layer.reader_index], 1) if joined[key].reader == layer.reader else None
        reader = None if reader_index is None else layer.reader
        joined[key] = replace(layer, index=index, reader=reader, reader_index=reader_index)
    return list(joined.values())


def _joined_slices(slices: Iterable[Slice]) -> list[Slice]:
    """Parts of one dimension of a tensor as one."""
    joined: dict[tuple[str, int, bool, str | None], Slice] = {}
    for part in slices:
        key = part.tensor, part.dim, part.masked, part.layer
        before = joined.get(key)
        joined[key] = part if before is None else replace(part, index=torch.cat([before.index, part.index], 1))
    return list(joined.values())


def _size(size: SizeAttribute, owners: Mapping[Channel, list[Channel]]) -> SizeAttribute:
    """A number of channels, counted by the groups that they belong to now."""
    sources: dict[str, list[int]] = defaultdict(list)
    for group, channels in size.sources.items():
        for channel in channels.tolist():
            name, position = owners[group, channel][0]
            sources[name].append(position)
    return replace(size, sources={name: torch.tensor(found) for name, found in sources.items()})
