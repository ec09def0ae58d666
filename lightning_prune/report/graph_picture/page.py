"""The picture of a graph as a page, with the table of its groups."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_prune.graph.describe import parameters, percent, totals
from lightning_prune.report.graph_picture.svg import graph_svg
from lightning_prune.report.pages import render
from lightning_prune.report.table import Column, Entry, Table

if TYPE_CHECKING:
    from lightning_prune.graph import ChannelGraph, Group

LIST = 80  # characters of a list of layers; a longer one is folded


def graph_html(graph: ChannelGraph, *, title: str = "Channel graph") -> str:
    """One page with the picture of `graph_svg`, every group as numbers, and the notes of the trace.

    Args:
        graph: from `lightning_prune.trace`.
        title: such as the name of the model.

    Example:
        >>> import torch, lightning_prune as lp
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1))
        >>> page = graph_html(lp.trace(model, torch.zeros(1, 3, 8, 8)), title="a < b")
        >>> "<h1>a &lt; b</h1>" in page, page.count("<svg")
        (True, 1)
    """
    return render(
        "graph.html",
        title=title,
        tiles=_tiles(graph) if graph.groups else (),
        notes=graph.notes,
        nothing="" if graph.groups else totals(graph.groups),
        picture=graph_svg(graph, title=title, alone=False),
        groups=groups_table(graph),
    )


def _tiles(graph: ChannelGraph) -> tuple[tuple[str, str, str], ...]:
    """The numbers that decide whether pruning this model is worth it."""
    groups = graph.prunable_groups
    channels = sum(group.size for group in graph.groups)
    layers = {layer.name for group in graph.groups for layer in group.layers}
    tied = sum(len(group.layers) > 1 for group in groups)
    return (
        (percent(sum(group.size for group in groups), channels), "", f"of {channels:,} channels can be pruned"),
        (str(len(groups)), "", f"of {len(graph.groups)} groups can be pruned"),
        (str(tied), "", "of these join several layers"),
        (str(len(graph.layers)), "", f"of {len(layers)} layers can be pruned"),
    )


def groups_table(graph: ChannelGraph) -> Table:
    """A row per group; those that cannot be pruned are quiet."""
    numbers = (Column("Channels"), Column("Parameters"), Column("Per channel"))
    columns = (Column("Group"), *numbers, Column("Prunable", left=True), Column("Together with", left=True))
    rows = tuple(
        (group.name, *(f"{n:,}" for n in (group.size, *parameters(group, graph.shapes))), group.verdict, _others(group))
        for group in graph.groups
    )
    return Table(columns, rows, {number: "quiet" for number, group in enumerate(graph.groups) if not group.prunable})


def _others(group: Group) -> Entry:
    """The layers that the group is not named after; a long list waits to be opened."""
    names = ", ".join(layer.name for layer in group.layers[1:])
    return Entry(names) if len(names) <= LIST else Entry(f"{len(group.layers) - 1} other layers", more=names)
