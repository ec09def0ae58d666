"""Where everything lies in the picture of a graph: a row per layer, a lane per group."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lightning_prune.graph import ChannelGraph, Group, Layer


TIMES = "\N{MULTIPLICATION SIGN}"
COLOURS = 8  # in picture.css


@dataclass(frozen=True)
class Row:
    """One layer of the picture.

    Attributes:
        name: module path.
        kind: what the shape of its weight tells: "3×3", "linear", "3×3 depthwise".
        filters: how many filters it has; None where it only reads.
        makes: numbers of the lanes whose channels it makes.
        reads: numbers of the lanes whose channels it reads.
    """

    name: str
    kind: str
    filters: int | None
    makes: tuple[int, ...]
    reads: tuple[int, ...]


@dataclass(frozen=True)
class Lane:
    """One group of the picture: a vertical line from its first layer to the last that makes or reads its channels.

    Attributes:
        group: what it stands for.
        column: its place from the left; lanes of one column do not overlap.
        colour: its number in the palette; lanes near each other differ.
        first: its uppermost row.
        last: its lowest row.
        readers: names of the layers that read it, from top to bottom.
    """

    group: Group
    column: int
    colour: int
    first: int
    last: int
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Layout:
    """Rows from top to bottom, lanes in the order of the graph's groups."""

    rows: tuple[Row, ...]
    lanes: tuple[Lane, ...]

    @property
    def columns(self) -> int:
        """How many lanes lie side by side."""
        return max((lane.column for lane in self.lanes), default=-1) + 1


def layout(graph: ChannelGraph) -> Layout:
    """Place the layers of a graph below each other as they run, and its groups beside them.

    Args:
        graph: from `lightning_prune.trace`.

    Example:
        >>> import torch, lightning_prune as lp
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1))
        >>> placed = layout(lp.trace(model, torch.zeros(1, 3, 8, 8)))
        >>> [(row.name, row.kind, row.makes, row.reads) for row in placed.rows]
        [('0', '3×3', (0,), ()), ('2', '1×1', (1,), (0,))]
        >>> [(lane.column, lane.first, lane.last) for lane in placed.lanes]
        [(0, 0, 1), (1, 1, 1)]
    """
    makers = [list(dict.fromkeys(layer.name for layer in group.layers)) for group in graph.groups]
    readers = [_readers(graph, group) for group in graph.groups]
    names = _running_order(graph, readers)
    at = {name: row for row, name in enumerate(names)}
    spans = [
        (min(at[name] for name in (*made, *read)), max(at[name] for name in (*made, *read)))
        for made, read in zip(makers, readers, strict=True)
    ]
    columns = _columns(spans)
    places = zip(graph.groups, columns, _colours(spans, columns), spans, readers, strict=True)
    lanes = tuple(
        Lane(group, column, colour, *span, tuple(sorted(read, key=at.__getitem__)))
        for group, column, colour, span, read in places
    )
    rows = tuple(
        Row(
            name,
            *_kind_and_filters(graph, name),
            tuple(number for number, made in enumerate(makers) if name in made),
            tuple(number for number, read in enumerate(readers) if name in read),
        )
        for name in names
    )
    return Layout(rows, lanes)


def _readers(graph: ChannelGraph, group: Group) -> list[str]:
    """Layers whose weight loses input entries with the group; depthwise ones belong to the group instead."""
    by_weight = {layer.weight: layer for other in graph.groups for layer in other.layers}
    found: dict[str, None] = {}
    for part in group.slices:
        layer = by_weight.get(part.tensor)
        if layer is not None:
            if part.dim != layer.dim:  # masked or not: behind a sigmoid the reader's entries belong to the mask
                found[layer.name] = None
        elif part.dim == 1 and not part.masked and not part.norm:
            found[part.tensor.rpartition(".")[0] or part.tensor] = None
    return list(found)


def _running_order(graph: ChannelGraph, readers: list[list[str]]) -> list[str]:
    """Layers and other readers in the order they run, as far as the graph knows it.

    Known are the order within a group, the order of the groups' first layers, and that a reader runs after what it
    reads. Between layers that this leaves open, the order in which the model registers them decides.
    """
    registered = {name: place for place, name in enumerate(graph.shapes)}
    place: dict[str, int] = {}
    after: dict[str, set[str]] = {}
    for group, read in zip(graph.groups, readers, strict=True):
        for layer in group.layers:
            place.setdefault(layer.name, registered.get(layer.weight, len(place)))
        for name in read:
            place.setdefault(name, len(registered) + len(place))
        members = [layer.name for layer in group.layers]
        pairs = [*pairwise(members), *((members[0], name) for name in read)]
        # Traced in eval and in train mode, a layer may name a reader of the second run: before it, in its own group.
        readers_of = ((layer.name, layer.reader) for layer in group.layers)
        pairs += [(name, reader) for name, reader in readers_of if reader is not None and reader not in members]
        for before, later in pairs:
            after.setdefault(before, set()).add(later)
    for one, other in pairwise(graph.groups):
        after.setdefault(one.layers[0].name, set()).add(other.layers[0].name)
    return _sorted(place, after)


def _sorted(place: dict[str, int], after: dict[str, set[str]]) -> list[str]:
    """Topological order; the smallest place first where there is a choice, or a loop (a layer called twice)."""
    edges = {name: {n for n in after.get(name, ()) if n in place and n != name} for name in place}
    waiting = dict.fromkeys(place, 0)
    for name in (name for later in edges.values() for name in later):
        waiting[name] += 1
    ready = [(place[name], name) for name, count in waiting.items() if not count]
    heapq.heapify(ready)
    order: list[str] = []
    while waiting:
        name = heapq.heappop(ready)[1] if ready else min(waiting, key=place.__getitem__)
        if waiting.pop(name, None) is None:
            continue
        order.append(name)
        for later in edges[name]:
            if later in waiting:
                waiting[later] -= 1
                if not waiting[later]:
                    heapq.heappush(ready, (place[later], later))
    return order


def _columns(spans: list[tuple[int, int]]) -> list[int]:
    """The leftmost free column of each lane, the longest first: the trunk of a residual network stays straight."""
    columns = [0] * len(spans)
    taken: list[list[tuple[int, int]]] = []
    for number in sorted(range(len(spans)), key=lambda n: (spans[n][0] - spans[n][1], n)):
        first, last = spans[number]
        free = (c for c, column in enumerate(taken) if all(last < top or bottom < first for top, bottom in column))
        columns[number] = column = next(free, len(taken))
        if column == len(taken):
            taken.append([])
        taken[column].append((first, last))
    return columns


def _colours(spans: list[tuple[int, int]], columns: list[int]) -> list[int]:
    """For each lane the next colour of the palette that no lane beside, above or below it has."""
    chosen: list[int] = []
    for number, (first, last) in enumerate(spans):
        near = {
            chosen[other]
            for other, (top, bottom) in enumerate(spans[:number])
            if abs(columns[other] - columns[number]) <= 2 and top - 3 <= last and first <= bottom + 3
        }
        wanted = (chosen[-1] + 1) % COLOURS if chosen else 0
        free = ((wanted + step) % COLOURS for step in range(COLOURS))
        chosen.append(next((colour for colour in free if colour not in near), wanted))
    return chosen


def _kind_and_filters(graph: ChannelGraph, name: str) -> tuple[str, int | None]:
    found = [(group, layer) for group in graph.groups for layer in group.layers if layer.name == name]
    if not found:
        return "reads only", None
    layer = found[0][1]
    shape = graph.shapes.get(layer.weight, ())
    kind = "linear" if len(shape) == 2 else TIMES.join(map(str, shape[2:]))
    if layer.dim == 1 and len(shape) > 2:
        kind += " transposed"
    elif len(shape) > 2 and shape[1] == 1 and any(_inside(group, layer) for group, layer in found):
        kind += " depthwise"
    return kind, layer.filters


def _inside(group: Group, layer: Layer) -> bool:
    """Whether the channels of a group pass through a layer of the group, as they do in a depthwise convolution."""
    names: Iterable[str | None] = (other.reader for other in group.layers if other.name != layer.name)
    return layer.name in names
