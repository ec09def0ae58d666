"""A channel graph in words: the table that people read before they prune."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lightning_prune.graph.groups import ChannelGraph, Group

HEAD = ("group", "layers", "channels", "parameters", "per channel", "prunable")
LIST = 56  # characters of a list of layers: the table still fits an ordinary terminal


def describe(graph: ChannelGraph) -> str:
    """Tabulate the groups of a graph, with the totals and the notes of the trace below.

    "parameters" are all that have an entry in the group: the filters of its layers, their biases and batch norms,
    and what other layers read these channels with. Removing one channel removes "per channel" of them. A weight
    between two groups counts in both.

    Args:
        graph: from `lightning_prune.trace`.

    Example:
        >>> import torch, lightning_prune as lp
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1))
        >>> print(describe(lp.trace(model, torch.zeros(1, 3, 8, 8))))
        group  layers  channels  parameters  per channel  prunable
        -----  ------  --------  ----------  -----------  --------
        0           1         8         256           32  yes
        2           1         4          36            9  no: reaches the model's output
        <BLANKLINE>
        8 of 12 channels (67 %) can be pruned: 1 of 2 groups, 1 of 2 layers.
    """
    rows = [HEAD, *(_row(graph, group) for group in graph.groups)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    rule = tuple("-" * width for width in (*widths[:-1], len(HEAD[-1])))
    table = [*(_aligned(row, widths) for row in (HEAD, rule, *rows[1:])), ""] if graph.groups else []
    return "\n".join([*table, totals(graph), *(f"note: {note}" for note in graph.notes)])


def totals(graph: ChannelGraph) -> str:
    """Say in one sentence how much of a model can be pruned at all.

    Example:
        >>> from lightning_prune.graph.groups import ChannelGraph
        >>> totals(ChannelGraph((), {}))
        'There are no channels to prune: no convolution or linear layer was seen.'
    """
    if not graph.groups:
        return "There are no channels to prune: no convolution or linear layer was seen."
    channels = sum(group.size for group in graph.groups)
    prunable = sum(group.size for group in graph.prunable_groups)
    layers = len({layer.name for group in graph.groups for layer in group.layers})
    return (
        f"{prunable:,} of {channels:,} channels ({percent(prunable, channels)}) can be pruned: "
        f"{len(graph.prunable_groups)} of {len(graph.groups)} groups, {len(graph.layers)} of {layers} layers."
    )


def percent(part: int, whole: int) -> str:
    """A share as people say it; all and nothing are said only where they are exact.

    Example:
        >>> percent(2, 3), percent(999, 1000), percent(1, 1000), percent(0, 8)
        ('67 %', '99 %', '1 %', '0 %')
    """
    if part in (0, whole):
        return "100 %" if part else "0 %"
    return f"{min(99, max(1, round(100 * part / whole)))} %"


def parameters(graph: ChannelGraph, group: Group) -> tuple[int, int]:
    """Count the parameters that hang on a group, and those that go with its first channel.

    Args:
        graph: the graph that holds the group.
        group: one of its groups.

    Returns:
        Number for the whole group, number for one channel.

    Example:
        >>> import torch, lightning_prune as lp
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1))
        >>> graph = lp.trace(model, torch.zeros(1, 3, 8, 8))
        >>> parameters(graph, graph.group("0"))  # a filter of 27, its bias, 4 weights that read it
        (256, 32)
    """
    touched: dict[str, dict[int, list[torch.Tensor]]] = {}
    for part in group.slices:
        # Running statistics are the only flat tensors that masking leaves alone; they are no parameters.
        if part.tensor in graph.shapes and (part.masked or len(graph.shapes[part.tensor]) > 1):
            touched.setdefault(part.tensor, {}).setdefault(part.dim, []).append(part.index)
    whole = one = 0
    for tensor, dims in touched.items():
        shape = list(graph.shapes[tensor])
        all_left, one_left = shape.copy(), shape.copy()
        for dim, indices in dims.items():
            all_left[dim] -= torch.cat([index.flatten() for index in indices]).unique().numel()
            one_left[dim] -= torch.cat([index[0] for index in indices]).unique().numel()
        # A weight that both makes and reads the group loses rows and columns, and where they cross only once.
        whole += math.prod(shape) - math.prod(all_left)
        one += math.prod(shape) - math.prod(one_left)
    return whole, one


def shortened(names: Sequence[str], limit: int = LIST) -> str:
    """List names up to a length; where some are left out, their total number follows in brackets.

    Args:
        names: at least one.
        limit: characters; the first name is always there.

    Example:
        >>> shortened(["stem", "a.conv2", "b.conv2"]), shortened(["stem", "a.conv2", "b.conv2"], 15)
        ('stem, a.conv2, b.conv2', 'stem, a.conv2 … (3)')
    """
    shown = names[0]
    for name in names[1:]:
        if len(shown) + len(name) + 2 > limit:
            return f"{shown} … ({len(names)})"
        shown += f", {name}"
    return shown


def _row(graph: ChannelGraph, group: Group) -> tuple[str, ...]:
    whole, one = parameters(graph, group)
    verdict = group.verdict
    others = [layer.name for layer in group.layers[1:]]  # the first one is the group's name
    if others:
        verdict += f"{',' if verdict == 'yes' else ';'} together with {shortened(others)}"
    return group.name, str(len(group.layers)), f"{group.size:,}", f"{whole:,}", f"{one:,}", verdict


def _aligned(row: tuple[str, ...], widths: list[int]) -> str:
    """Name and verdict to the left, numbers to the right."""
    name, *numbers, verdict = row
    cells = [cell.rjust(width) for cell, width in zip(numbers, widths[1:-1], strict=True)]
    return "  ".join([name.ljust(widths[0]), *cells, verdict]).rstrip()
