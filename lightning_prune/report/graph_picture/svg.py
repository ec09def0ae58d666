"""The picture itself: a line per layer, and beside it the groups as the lines of a metro map."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from lightning_prune.graph.describe import shortened, totals
from lightning_prune.report.figures import bands
from lightning_prune.report.graph_picture.layout import Lane, Layout, Row, layout
from lightning_prune.report.pages import render
from lightning_prune.report.table import shorten

if TYPE_CHECKING:
    from lightning_prune.graph import ChannelGraph, Group

EDGE = 16  # paper around the picture
BOX = 50  # the box with the number of filters
NAME = 46  # longest name and
REMARK = 96  # longest remark in characters; all of it is in the tooltip
MONO, SANS = 7.25, 6.2  # width of a character of 12 pixels: over the average, so that nothing is cut
NOTES = 8  # a picture is no log


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
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1))
        >>> picture = graph_svg(lp.trace(model, torch.zeros(1, 3, 8, 8)), title="a < b")
        >>> picture[:4], "a &lt; b" in picture
        ('<svg', True)
    """
    placed = layout(graph)
    said = [remarks(placed, row) for row in placed.rows]
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
        lanes=[(lane, _look(lane), _tooltip(lane)) for lane in placed.lanes],
        notes=notes,
    )


def remarks(placed: Layout, row: Row) -> list[tuple[str, int]]:
    """What is said of a layer beside the map, each with the number of the lane it is about.

    Example:
        >>> import torch, lightning_prune as lp
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1))
        >>> placed = layout(lp.trace(model, torch.zeros(1, 3, 8, 8)))
        >>> remarks(placed, placed.rows[1])
        [("not prunable: reaches the model's output", 1)]
    """
    said = []
    for number in row.makes:
        group = placed.lanes[number].group
        first, count = group.layers[0].name == row.name, len(group.layers)
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
            said.append((text if len(text) <= REMARK else f"{text[: REMARK - 1]}…", number))
    return said


def _refusal(group: Group) -> str:
    return f"not prunable: {group.reason}"


def _look(lane: Lane) -> str:
    """CSS class of a group's colour."""
    return f"k{lane.colour}" if lane.group.prunable else "frozen"


def _tooltip(lane: Lane) -> str:
    group = lane.group
    lines = [
        f"{group.name}: {group.size} channels, prunable: {group.verdict}",
        f"made by {', '.join(layer.name for layer in group.layers)}",
    ]
    return "\n".join([*lines, *([f"read by {', '.join(lane.readers)}"] if lane.readers else [])])


def _notes(graph: ChannelGraph, width: int) -> list[str]:
    """The reasons that were cut, and the notes, in lines: a picture passed on alone must not lose them."""
    cut: dict[str, list[str]] = {}
    for group in graph.groups:
        if not group.prunable and len(_refusal(group)) > REMARK:
            cut.setdefault(_refusal(group), []).append(group.name)
    notes = [f"{refusal}: {shortened(names)}" for refusal, names in cut.items()]
    notes += [f"Note: {note}" for note in graph.notes]
    left_out = len(notes) - NOTES
    notes = notes[:NOTES] + ([f"… and {left_out} more"] if left_out > 0 else [])
    return [line for note in notes for line in textwrap.wrap(note, width)]
