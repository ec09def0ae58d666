"""The picture itself: a line per layer, and beside it the groups as the lines of a metro map."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from typing import TYPE_CHECKING

from lightning_prune.graph.describe import shortened, totals
from lightning_prune.report import LayerChannels
from lightning_prune.report.figures import bands, shorten
from lightning_prune.report.graph_picture.layout import Lane, Layout, Row, layout

if TYPE_CHECKING:
    from lightning_prune.graph import ChannelGraph, Group

EDGE = 16  # paper around the picture
BOX = 50  # the box with the number of filters
NAME = 46  # longest name and
LABEL = 96  # longest remark in characters; all of it is in the tooltip
MONO, SANS = 7.25, 6.2  # width of a character of 12 pixels: over the average, so that nothing is cut
PLACE = re.compile(r" at '[^']*'")
NOTES = 8  # a picture is no log


@dataclass
class _Sheet:
    """Sizes that depend on the graph, and what has been drawn so far."""

    placed: Layout
    top: float = 0.0
    parts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        many = len(self.placed.rows) > 40
        self.pitch = 20 if many else 24  # pixels a row
        self.step = 15 if self.placed.columns > 12 else 20  # pixels a lane
        self.kind = EDGE + max([5, *(len(_short(row.name)) for row in self.placed.rows)]) * MONO + 18
        self.box = self.kind + max([6, *(len(row.kind) for row in self.placed.rows)]) * SANS + 22
        self.lanes = self.box + BOX + 26
        self.label = self.lanes + max(self.placed.columns - 1, 0) * self.step + 22
        longest = max([sum(len(text) + 3 for text, _ in remarks(self.placed, row)) for row in self.placed.rows] or [0])
        self.width = max(760.0, self.label + longest * SANS + EDGE)

    def y(self, row: int) -> float:
        """Middle of a row."""
        return self.top + (row + 0.5) * self.pitch

    def x(self, lane: Lane) -> float:
        """Middle of a lane."""
        return self.lanes + lane.column * self.step


def graph_svg(graph: ChannelGraph, *, title: str = "Channel graph") -> str:
    """Draw a graph: a row per layer in the order they run, a coloured line per group.

    A full dot is a layer that makes the channels of a group, a ring one that reads them. Layers on one thick line
    keep or lose the same channels; grey squares cannot be pruned, for the reason beside them. The file needs
    nothing else and follows the reader's light or dark scheme; pointing at a line brings it out.

    Args:
        graph: from `lightning_prune.trace`.
        title: stands above the picture.

    Example:
        >>> import torch, lightning_prune as lp
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1))
        >>> picture = graph_svg(lp.trace(model, torch.zeros(1, 3, 8, 8)), title="a < b")
        >>> picture[:4], "a &lt; b" in picture
        ('<svg', True)
    """
    sheet = _Sheet(layout(graph))
    sheet.parts.append(_text(EDGE, 32, title, "title") + _text(EDGE, 54, totals(graph.groups), "quiet"))
    sheet.top = 66
    _map(sheet)
    _below(sheet, graph)
    return _closed(sheet, title)


def bare_svg(graph: ChannelGraph, title: str) -> str:
    """The picture without title, totals and notes, for a page that says these itself."""
    sheet = _Sheet(layout(graph), top=8)
    _map(sheet)
    return _closed(sheet, title)


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
            words.append(f"{count} layers together" if first else f"with {_short(group.name)}")
        per_channel = group.layer(row.name).index.shape[1]
        if per_channel > 1:
            words.append(f"{group.size} channels of {per_channel} filters")
        if words:
            text = ", ".join(words)
            said.append((text if len(text) <= LABEL else f"{text[: LABEL - 1]}…", number))
    return said


def _refusal(group: Group) -> str:
    """Why not, without the place: that is this layer or one soon after it, and in the tooltip."""
    return f"not prunable: {PLACE.sub('', str(group.reason))}"


def _map(sheet: _Sheet) -> None:
    """Legend, heads of the columns, bands of stages, rows, lanes."""
    _legend(sheet)
    sheet.top += 34
    heads = (("layer", EDGE), ("kernel", sheet.kind), ("filters", sheet.box), ("groups", sheet.lanes - 6))
    sheet.parts += [_text(x, sheet.top - 9, word, "head") for word, x in heads]
    rows = sheet.placed.rows
    stages = bands(tuple(LayerChannels(row.name, row.filters or 0, 0) for row in rows))
    for start, end in stages[1::2]:
        height = (end - start + 1) * sheet.pitch
        sheet.parts.append(
            f'<rect class="band" x="0" y="{sheet.y(start) - sheet.pitch / 2:g}" width="100%" height="{height:g}"/>'
        )
    sheet.parts += [_row(sheet, at, row) for at, row in enumerate(rows)]
    drawn = [_lane(sheet, number, lane) for number, lane in enumerate(sheet.placed.lanes)]
    sheet.parts.append(f'<g class="lanes">{"".join(drawn)}</g>')
    sheet.top += len(rows) * sheet.pitch


def _row(sheet: _Sheet, at: int, row: Row) -> str:
    """Name, kernel, box with the number of filters, and the remark; a hairline leads from the box to the marks."""
    y, name = sheet.y(at), _short(row.name)
    path, dot, leaf = name.rpartition(".")
    marks = [sheet.x(sheet.placed.lanes[number]) for number in (*row.makes, *row.reads)]
    said = "".join(
        f'<tspan class="{_look(sheet.placed, number)}">{escape(text)}</tspan>{"   " if more else ""}'
        for (text, number), more in _with_more(remarks(sheet.placed, row))
    )
    parts = [
        f'<path class="guide" d="M{sheet.box + BOX:g} {y:g}H{max(marks):g}"/>' if marks else "",
        f'<text class="name" x="{EDGE}" y="{y + 4:g}"><title>{escape(row.name)}</title>'
        f'<tspan class="quiet">{escape(path + dot)}</tspan>{escape(leaf)}</text>',
        _text(sheet.kind, y + 4, row.kind, "kind"),
        _box(sheet, y, row),
        f'<text class="said" x="{sheet.label:g}" y="{y + 4:g}">{said}</text>' if said else "",
    ]
    return "".join(parts)


def _box(sheet: _Sheet, y: float, row: Row) -> str:
    """The number of filters, in the colour of the group; filters of several groups share the box."""
    if row.filters is None:
        return ""
    height, width = sheet.pitch - 6, BOX / max(len(row.makes), 1)
    boxes = [
        f'<rect class="box {_look(sheet.placed, number)}" x="{sheet.box + at * width:g}" y="{y - height / 2:g}" '
        f'width="{width:g}" height="{height}" rx="4"/>'
        for at, number in enumerate(row.makes)
    ]
    number = f'<text class="count" x="{sheet.box + BOX / 2:g}" y="{y + 4:g}">{row.filters:,}</text>'
    return "".join(boxes) + number


def _lane(sheet: _Sheet, number: int, lane: Lane) -> str:
    """A group: its line, a full mark where it is made, a ring where it is read."""
    x, group = sheet.x(lane), lane.group
    top, bottom = sheet.y(lane.first), sheet.y(lane.last)
    line = f"M{x:g} {top:g}V{bottom:g}"
    size = 5 if len(group.layers) > 1 else 4
    marks = []
    for at in range(lane.first, lane.last + 1):
        row, y = sheet.placed.rows[at], sheet.y(at)
        if number in row.makes and group.prunable:
            marks.append(f'<circle class="made" cx="{x:g}" cy="{y:g}" r="{size}"/>')
        elif number in row.makes:
            marks.append(f'<rect class="made" x="{x - 4:g}" y="{y - 4:g}" width="8" height="8"/>')
        elif number in row.reads:
            marks.append(f'<circle class="read" cx="{x:g}" cy="{y:g}" r="3.5"/>')
    kind = f"lane {_look(sheet.placed, number)}{' tied' if len(group.layers) > 1 else ''}"
    return (
        f'<g class="{kind}"><title>{escape(_tooltip(lane))}</title><path class="hit" d="{line}"/>'
        f'<path class="line" d="{line}"/>{"".join(marks)}</g>'
    )


def _tooltip(lane: Lane) -> str:
    group = lane.group
    lines = [
        f"{group.name}: {group.size} channels, prunable: {group.verdict}",
        f"made by {', '.join(layer.name for layer in group.layers)}",
    ]
    if lane.readers:
        lines.append(f"read by {', '.join(lane.readers)}")
    return "\n".join(lines)


def _legend(sheet: _Sheet) -> None:
    """What the marks mean, in as many lines as the width asks for."""
    y, x = sheet.top + 20, float(EDGE)
    entries = (
        ('<circle class="made" cx="7" cy="-4" r="4"/>', "makes a group's channels", "k0"),
        ('<circle class="read" cx="7" cy="-4" r="3.5"/>', "reads them", "k0"),
        (
            '<path class="line" d="M7 -15V7"/><circle class="made" cx="7" cy="-4" r="5"/>',
            "layers that lose the same ones",
            "k1 tied",
        ),
        ('<rect class="made" x="3" y="-8" width="8" height="8"/>', "not prunable", "frozen"),
    )
    for mark, words, look in entries:
        wide = 20 + len(words) * SANS + 22
        if x + wide > sheet.width:
            x, y = float(EDGE), y + 20
        sheet.parts.append(
            f'<g class="lane {look}" transform="translate({x:g} {y:g})">{mark}'
            f'<text class="kind" x="18">{words}</text></g>'
        )
        x += wide
    sheet.top = y + 8


def _below(sheet: _Sheet, graph: ChannelGraph) -> None:
    """The reasons that were cut, and the notes: a picture passed on alone must not lose them."""
    cut: dict[str, list[str]] = {}
    for group in graph.groups:
        if not group.prunable and len(_refusal(group)) > LABEL:
            cut.setdefault(_refusal(group), []).append(group.name)
    lines = [f"{refusal}: {shortened(names)}" for refusal, names in cut.items()]
    lines += [f"Note: {note}" for note in graph.notes]
    left_out = len(lines) - NOTES
    lines = lines[:NOTES] + ([f"… and {left_out} more"] if left_out > 0 else [])
    sheet.top += 10
    for line in lines:
        for wrapped in textwrap.wrap(line, int((sheet.width - 2 * EDGE) / SANS)):
            sheet.top += 18
            sheet.parts.append(_text(EDGE, sheet.top, wrapped, "kind"))


def _closed(sheet: _Sheet, title: str) -> str:
    """The whole file around the parts."""
    style = (resources.files("lightning_prune.report.graph_picture") / "picture.css").read_text(encoding="utf-8")
    width, height = round(sheet.width), round(sheet.top + EDGE)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="channel-graph" role="img" aria-label="{escape(title)}" '
        f'width="{width}" height="{height}" viewBox="0 0 {width} {height}">\n<style>\n{style}</style>\n'
        '<defs><pattern id="not-prunable" width="5" height="5" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><rect class="ground" width="5" height="5"/><path class="hatch" d="M0 0V5"/>'
        '</pattern></defs>\n<rect class="paper" width="100%" height="100%"/>\n' + "\n".join(sheet.parts) + "\n</svg>\n"
    )


def _text(x: float, y: float, words: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{escape(words)}</text>'


def _look(placed: Layout, number: int) -> str:
    """CSS class of a group's colour."""
    return f"k{placed.lanes[number].colour}" if placed.lanes[number].group.prunable else "frozen"


def _short(name: str) -> str:
    return shorten(name, NAME)


def _with_more(items: list[tuple[str, int]]) -> list[tuple[tuple[str, int], bool]]:
    return [(item, at < len(items) - 1) for at, item in enumerate(items)]
