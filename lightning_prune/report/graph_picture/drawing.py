"""The picture as SVG and on a page: a line per layer, and beside it the groups as the lines of a metro map."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from lightning_prune.graph.describe import parameters, percent, shortened, totals
from lightning_prune.report.figures import bands
from lightning_prune.report.graph_picture.layout import Lane, Layout, Row, layout
from lightning_prune.report.pages import render
from lightning_prune.report.table import Column, Entry, Table, shorten

if TYPE_CHECKING:
    from lightning_prune.graph import ChannelGraph, Group

EDGE = 16  # paper around the picture
BOX = 50  # the box with the number of filters
NAME = 46  # longest name and
REMARK = 96  # longest remark in characters; all of it is in the tooltip
MONO, SANS = 7.25, 6.2  # width of a character of 12 pixels: over the average, so that nothing is cut
NOTES = 8  # a picture is no log
LIST = 80  # characters of a list of layers on the page; a longer one is folded


def graph_svg(graph: ChannelGraph, *, title: str = "Channel graph", alone: bool = True) -> str:
    """Draw a graph: a row per layer in the order they run, a coloured line per group.

    A full dot is a layer that makes the channels of a group, a ring one that reads them. Layers on one thick line
    keep or lose the same channels; grey squares cannot be pruned, for the reason beside them. The file needs
    nothing else and follows the reader's light or dark scheme; pointing at a line brings it out.

    Args:
        graph: from `lightning_prune.trace`.
        title: stands above the picture.
        alone: with colours, title, totals and notes; without them for a page that has its own.

    Example:
        >>> import torch, lightning_prune as lp
        >>> picture = graph_svg(lp.trace(torch.nn.Linear(3, 8), torch.zeros(1, 3)), title="a < b")
        >>> picture[:4], "a &lt; b" in picture
        ('<svg', True)
    """
    placed = layout(graph)
    said = [_remarks(placed, row) for row in placed.rows]
    names = [shorten(row.name, NAME) for row in placed.rows]
    pitch = 20 if len(names) > 40 else 24  # pixels a row
    step = 15 if placed.columns > 12 else 20  # pixels a lane
    kernel = EDGE + max([5, *map(len, names)]) * MONO + 18
    box = kernel + max([6, *(len(row.kind) for row in placed.rows)]) * SANS + 22
    lanes = box + BOX + 26
    remark = lanes + max(placed.columns - 1, 0) * step + 22
    longest = max((len("   ".join(text for text, _ in texts)) for texts in said), default=0)
    width = max(760.0, remark + longest * SANS + EDGE)
    top = 128 if alone else 70
    notes = _notes(graph, int((width - 2 * EDGE) / SANS)) if alone else []
    bottom = top + len(names) * pitch + (10 if notes else 0)
    return render(
        "graph.svg",
        alone=alone,
        box=BOX,
        title=title,
        totals=totals(graph.groups),
        width=round(width),
        height=round(bottom + 18 * len(notes) + EDGE),
        columns={"layer": EDGE, "kernel": kernel, "filters": box, "groups": lanes - 6},
        at={"top": top, "pitch": pitch, "box": box, "lanes": lanes, "step": step, "remark": remark, "bottom": bottom},
        bands=bands([row.name for row in placed.rows])[1::2],
        rows=[(row, name.rpartition("."), texts) for row, name, texts in zip(placed.rows, names, said, strict=True)],
        lanes=placed.lanes,
        notes=notes,
    )


def graph_html(graph: ChannelGraph, *, title: str = "Channel graph") -> str:
    """One page with the picture of `graph_svg`, every group as numbers, and the notes of the trace.

    Args:
        graph: from `lightning_prune.trace`.
        title: such as the name of the model.

    Example:
        >>> import torch, lightning_prune as lp
        >>> page = graph_html(lp.trace(torch.nn.Linear(3, 8), torch.zeros(1, 3)), title="a < b")
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
        groups=_groups_table(graph),
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


def _groups_table(graph: ChannelGraph) -> Table:
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


def _remarks(placed: Layout, row: Row) -> list[tuple[str, Lane]]:
    """What is said of a layer beside the map, each with the lane it is about."""
    said = []
    for number in row.makes:
        lane = placed.lanes[number]
        group, count = lane.group, len(lane.group.layers)
        first = group.layers[0].name == row.name
        words = []
        if not group.prunable and first:
            words.append(_refusal(group))
        if count > 1:
            words.append(f"{count} layers together" if first else f"with {shorten(group.name, NAME)}")
        per_channel = group.layer(row.name).index.shape[1]
        if per_channel > 1:
            words.append(f"{group.size} channels of {per_channel} filters")
        if words:
            text = ", ".join(words)
            said.append((text if len(text) <= REMARK else f"{text[: REMARK - 1]}…", lane))
    return said


def _refusal(group: Group) -> str:
    return f"not prunable: {group.reason}"


def _notes(graph: ChannelGraph, width: int) -> list[str]:
    """The reasons that were cut, and the notes, in lines: a picture passed on alone must not lose them."""
    cut: dict[str, list[str]] = {}
    for group in graph.groups:
        if not group.prunable and len(_refusal(group)) > REMARK:
            cut.setdefault(_refusal(group), []).append(group.name)
    notes = [f"{refusal}: {shortened(names)}" for refusal, names in cut.items()]
    notes += [f"Note: {note}" for note in graph.notes]
    if len(notes) > NOTES:
        notes[NOTES:] = [f"… and {len(notes) - NOTES} more"]
    return [line for note in notes for line in textwrap.wrap(note, width)]
