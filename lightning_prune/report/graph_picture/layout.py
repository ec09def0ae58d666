"""Where everything lies in the picture of a graph: a row per layer, a lane per group."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import TYPE_CHECKING

from lightning_prune.report.table import TIMES

if TYPE_CHECKING:
    from lightning_prune.graph import ChannelGraph, Group, Layer

COLOURS = 8  # in style.css


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
    at = {name: row for row, name in enumerate(_running_order(graph, readers))}
    used = [sorted({*made, *read}, key=at.__getitem__) for made, read in zip(makers, readers, strict=True)]
    spans = [(at[names[0]], at[names[-1]]) for names in used]
    columns, colours = _columns_and_colours(spans)
    lanes = tuple(
        Lane(group, columns[number], colours[number], *spans[number], tuple(n for n in at if n in readers[number]))
        for number, group in enumerate(graph.groups)
    )
    rows = tuple(
        Row(
            name,
            *_kind_and_filters(graph, name),
            tuple(number for number, made in enumerate(makers) if name in made),
            tuple(number for number, read in enumerate(readers) if name in read),
        )
        for name in at
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


def _running_order(graph: ChannelGraph, readers: list[list[str]]) -> Iterator[str]:
    """Layers and other readers in the order they run, as far as the graph knows it.

    Known are the order within a group, the order of the groups' first layers, and that a reader runs after what it
    reads. Between layers that this leaves open, or that run in a loop, the order in which the model registers them
    decides.
    """
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
    """For each lane the leftmost free column, and a colour that no lane beside, above or below it has.

    The longest lanes choose first, so that the trunk of a residual network stays straight.
    """
    import networkx as nx

    lanes = range(len(spans))

    def rows_between(one: int, other: int) -> int:
        return max(spans[one][0], spans[other][0]) - min(spans[one][1], spans[other][1])

    def first_fit(order: Sequence[int], clash: Callable[[int, int], bool]) -> dict[int, int]:
        clashes = nx.Graph(pair for pair in combinations(lanes, 2) if clash(*pair))
        clashes.add_nodes_from(lanes)
        return nx.greedy_color(clashes, lambda *_: order)

    longest = sorted(lanes, key=lambda lane: spans[lane][0] - spans[lane][1])
    columns = first_fit(longest, lambda one, other: rows_between(one, other) < 1)
    colours = first_fit(lanes, lambda *pair: rows_between(*pair) < 4 and abs(columns[pair[0]] - columns[pair[1]]) <= 2)
    return columns, {lane: colour % COLOURS for lane, colour in colours.items()}


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
    return layer.name in (other.reader for other in group.layers if other.name != layer.name)
