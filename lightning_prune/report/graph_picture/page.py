"""The picture of a graph as a page, with the table of its groups."""

from __future__ import annotations

from html import escape
from importlib import resources
from typing import TYPE_CHECKING

from lightning_prune.graph.describe import parameters, percent, totals
from lightning_prune.report.graph_picture.svg import bare_svg
from lightning_prune.report.html import POLICY

if TYPE_CHECKING:
    from lightning_prune.graph import ChannelGraph, Group

STYLE = """main { max-width: 84rem; }
figure { width: fit-content; max-width: 100%; } figure svg { display: block; }
.groups .words { text-align: left; white-space: normal; min-width: 13rem; padding-left: 1.5rem; }
.groups details { margin: 0; } .groups summary { color: inherit; font-size: inherit; }
.groups .no td, .groups .no th { color: var(--quiet); }
"""
LIST = 80  # characters of a list of layers; a longer one is folded
HEAD = ("Group", "Channels", "Parameters", "Per channel", "Prunable", "Together with")


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
    style = (resources.files("lightning_prune.report") / "page.css").read_text(encoding="utf-8") + STYLE
    parts = [f"<h1>{escape(title)}</h1>"]
    if not graph.groups:
        parts.append(f"<p>{escape(totals(graph.groups))}</p>")
    else:
        parts += [_tiles(graph), f"<figure>{bare_svg(graph, title)}</figure>", "<h2>Groups</h2>", _table(graph)]
    if graph.notes:
        parts += ["<h2>Notes</h2>", *(f"<p>{escape(note)}</p>" for note in graph.notes)]
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _tiles(graph: ChannelGraph) -> str:
    """The numbers that decide whether pruning this model is worth it."""
    groups = graph.prunable_groups
    channels = sum(group.size for group in graph.groups)
    layers = {layer.name for group in graph.groups for layer in group.layers}
    tied = sum(len(group.layers) > 1 for group in groups)
    tiles = (
        (f"of {channels:,} channels can be pruned", percent(sum(group.size for group in groups), channels)),
        (f"of {len(graph.groups)} groups can be pruned", str(len(groups))),
        ("of these join several layers", str(tied)),
        (f"of {len(layers)} layers can be pruned", str(len(graph.layers))),
    )
    shown = "".join(f"<div><dd>{escape(value)}</dd><dt>{escape(what)}</dt></div>" for what, value in tiles)
    return f'<dl class="tiles">{shown}</dl>'


def _table(graph: ChannelGraph) -> str:
    head = "".join(f"<th scope=col{' class=words' if title in HEAD[-2:] else ''}>{title}</th>" for title in HEAD)
    rows = "".join(_row(graph, group) for group in graph.groups)
    return (
        f'<div class="scroll"><table class="groups"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        '<p class="foot">Parameters: all that have an entry in the group; removing one channel removes those per '
        "channel. A weight between two groups counts in both.</p>"
    )


def _row(graph: ChannelGraph, group: Group) -> str:
    whole, one = parameters(group, graph.shapes)
    numbers = "".join(f"<td>{number:,}</td>" for number in (group.size, whole, one))
    return (
        f"<tr{'' if group.prunable else ' class=no'}><th scope=row>{escape(group.name)}</th>{numbers}"
        f'<td class="words">{_path(group.verdict)}</td><td class="words">{_others(group)}</td></tr>'
    )


def _others(group: Group) -> str:
    """The layers that the group is not named after; a long list waits to be opened."""
    names = ", ".join(layer.name for layer in group.layers[1:])
    if len(names) <= LIST:
        return _path(names)
    return f"<details><summary>{len(group.layers) - 1} other layers</summary>{_path(names)}</details>"


def _path(words: str) -> str:
    """Escaped, with leave to break after the dots of module paths."""
    return escape(words).replace(".", ".<wbr>")
