"""Where everything lies in the picture of a graph: a row per layer, a lane per group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import TYPE_CHECKING

from lightning_prune.report.table import TIMES

if TYPE_CHECKING:
    from lightning_prune.graph import ChannelGraph, Group
    from lightning_prune.graph.groups import Layer

COLOURS = 8  # in style.css


@dataclass(frozen=True)
class Row:
    """One layer of the picture, and the numbers of the lanes whose channels it makes and reads."""

    name: str
    kind: str  # what the shape of its weight tells: "3×3", "linear", "3×3 depthwise"
    filters: int | None  # None where it only reads
    makes: tuple[int, ...]
    reads: tuple[int, ...]


@dataclass(frozen=True)
class Lane:
    """One group of the picture: a vertical line from its first layer to the last that makes or reads its channels."""

    group: Group
    column: int  # from the left; lanes of one column do not overlap
    colour: int  # lanes near each other differ
    first: int  # row
    last: int
    readers: tuple[str, ...]  # from top to bottom

    @property
    def look(self) -> str:
        """CSS class."""
        return f"k{self.colour}" if self.group.prunable else "frozen"


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
    """Place the layers of a graph below each other as they run, and its groups beside them."""
    by_weight = {layer.weight: layer for group in graph.groups for layer in group.layers}
    readers = [_readers(by_weight, group) for group in graph.groups]
    rows = tuple(
        Row(
            name,
            *_kind_and_filters(graph, name),
            tuple(n for n, group in enumerate(graph.groups) if name in {layer.name for layer in group.layers}),
            tuple(n for n, read in enumerate(readers) if name in read),
        )
        for name in _running_order(graph, readers)
    )
    used = [[at for at, row in enumerate(rows) if n in (*row.makes, *row.reads)] for n in range(len(readers))]
    spans = [(found[0], found[-1]) for found in used]
    columns, colours = _columns_and_colours(spans)
    lanes = tuple(
        Lane(group, columns[n], colours[n], *spans[n], tuple(row.name for row in rows if n in row.reads))
        for n, group in enumerate(graph.groups)
    )
    return Layout(rows, lanes)


def _readers(by_weight: Mapping[str, Layer], group: Group) -> list[str]:
    """Layers whose weight loses input entries with the group; depthwise ones belong to the group instead."""
    found: dict[str, None] = {}
    for part in group.slices:
        layer = by_weight.get(part.tensor)
        if layer is not None:
            if part.dim != layer.dim:  # masked or not: behind a sigmoid the reader's entries belong to the mask
                found[layer.name] = None
        elif part.dim == 1 and not part.masked and not part.norm:
            found[part.tensor.rpartition(".")[0] or part.tensor] = None
    return list(found)


def _running_order(graph: ChannelGraph, readers: list[list[str]]) -> Iterator[str]:
    """Layers and other readers in the order they run; where the graph leaves it open, in the order of registration."""
    import networkx as nx  # type: ignore[import-untyped]

    registered = {name: place for place, name in enumerate(graph.shapes)}
    place: dict[str, int] = {}
    order = nx.DiGraph()
    for group, read in zip(graph.groups, readers, strict=True):
        members = [layer.name for layer in group.layers]
        for layer in group.layers:
            place.setdefault(layer.name, registered.get(layer.weight, len(place)))
            # Traced in eval and in train mode, it may name a reader of the second run: before it, in its own group.
            if layer.reader is not None and layer.reader not in members:
                order.add_edge(layer.name, layer.reader)
        for name in read:
            place.setdefault(name, len(registered) + len(place))
        nx.add_path(order, members)
        nx.add_star(order, [members[0], *read])
    order.add_edges_from((one.layers[0].name, other.layers[0].name) for one, other in pairwise(graph.groups))
    steps = nx.condensation(order.subgraph(place))  # layers that run in a loop make one step
    members_of = {step: sorted(names, key=place.__getitem__) for step, names in steps.nodes(data="members")}
    for step in nx.lexicographical_topological_sort(steps, key=lambda step: place[members_of[step][0]]):
        yield from members_of[step]


def _columns_and_colours(spans: Sequence[tuple[int, int]]) -> tuple[dict[int, int], dict[int, int]]:
    """For each lane the leftmost free column, and a colour that no lane beside, above or below it has."""
    import networkx as nx

    lanes = range(len(spans))

    def rows_between(one: int, other: int) -> int:
        return max(spans[one][0], spans[other][0]) - min(spans[one][1], spans[other][1])

    def first_fit(order: Sequence[int], clash: Callable[[int, int], bool]) -> dict[int, int]:
        clashes = nx.Graph(pair for pair in combinations(lanes, 2) if clash(*pair))
        clashes.add_nodes_from(lanes)
        return nx.greedy_color(clashes, lambda *_: order)

    # The longest choose first, so that the trunk of a residual network stays straight.
    longest = sorted(lanes, key=lambda lane: spans[lane][0] - spans[lane][1])
    columns = first_fit(longest, lambda one, other: rows_between(one, other) < 1)
    colours = first_fit(lanes, lambda *pair: rows_between(*pair) < 4 and abs(columns[pair[0]] - columns[pair[1]]) <= 2)
    return columns, {lane: colour % COLOURS for lane, colour in colours.items()}


def _kind_and_filters(graph: ChannelGraph, name: str) -> tuple[str, int | None]:
    groups = [group for group in graph.groups if name in {layer.name for layer in group.layers}]
    if not groups:
        return "reads only", None
    layer = groups[0].layer(name)
    shape = graph.shapes.get(layer.weight, ())
    kind = "linear" if len(shape) == 2 else TIMES.join(map(str, shape[2:]))
    if layer.dim == 1 and len(shape) > 2:
        kind += " transposed"
    elif len(shape) > 2 and shape[1] == 1:
        others = [other for group in groups for other in group.layers if other.name != name]
        if name in (other.reader for other in others):  # the channels of the group pass through it
            kind += " depthwise"
    return kind, layer.filters
