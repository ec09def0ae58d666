"""A channel graph in words: the table that people read before they prune."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from lightning_prune.graph.groups import Group

Shapes = Mapping[str, Sequence[int]]  # of every parameter and buffer

HEAD = ("group", "layers", "channels", "parameters", "per channel", "prunable")
LIST = 56  # characters of a list of layers: the table still fits an ordinary terminal


def describe(groups: Sequence[Group], shapes: Shapes, notes: Sequence[str] = ()) -> str:
    """Tabulate the groups of a graph, with the totals and the notes of the trace below.

    "parameters" are all that have an entry in the group: the filters of its layers, their biases and batch norms,
    and what other layers read these channels with. Removing one channel removes "per channel" of them. A weight
    between two groups counts in both.

    Args:
        groups: of one `ChannelGraph`.
        shapes: of the model's tensors.
        notes: what the trace could not see or follow.

    Example:
        >>> import torch, lightning_prune as lp
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1))
        >>> print(lp.trace(model, torch.zeros(1, 3, 8, 8)).describe())
        group  layers  channels  parameters  per channel  prunable
        -----  ------  --------  ----------  -----------  --------
        0           1         8         256           32  yes
        2           1         4          36            9  no: reaches the model's output
        <BLANKLINE>
        8 of 12 channels (67 %) can be pruned: 1 of 2 groups, 1 of 2 layers.
    """
    rows = [_row(group, shapes) for group in groups]
    widths = [max(map(len, column)) for column in zip(HEAD, *rows, strict=True)]
    rule = tuple("-" * width for width in (*widths[:-1], len(HEAD[-1])))
    table = [*(_aligned(row, widths) for row in (HEAD, rule, *rows)), ""] if groups else []
    return "\n".join([*table, totals(groups), *(f"note: {note}" for note in notes)])


def totals(groups: Sequence[Group]) -> str:
    """Say in one sentence how much of a model can be pruned at all.

    Example:
        >>> totals([])
        'There are no channels to prune: no convolution or linear layer was seen.'
    """
    if not groups:
        return "There are no channels to prune: no convolution or linear layer was seen."
    prunable = [group for group in groups if group.prunable]
    all_channels, channels = (sum(group.size for group in some) for some in (groups, prunable))
    all_layers, layers = (len({layer.name for group in some for layer in group.layers}) for some in (groups, prunable))
    return (
        f"{channels:,} of {all_channels:,} channels ({percent(channels, all_channels)}) can be pruned: "
        f"{len(prunable)} of {len(groups)} groups, {layers} of {all_layers} layers."
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


def parameters(group: Group, shapes: Shapes) -> tuple[int, int]:
    """Count the parameters that hang on a group, and those that go with its first channel.

    Args:
        group: one of a graph's groups.
        shapes: of the model's tensors.

    Returns:
        Number for the whole group, number for one channel.

    Example:
        >>> import torch, lightning_prune as lp
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1))
        >>> graph = lp.trace(model, torch.zeros(1, 3, 8, 8))
        >>> parameters(graph.group("0"), graph.shapes)  # a filter of 27, its bias, 4 weights that read it
        (256, 32)
    """
    touched: dict[str, dict[int, list[torch.Tensor]]] = {}
    for part in group.slices:
        # Running statistics are the only flat tensors that masking leaves alone; they are no parameters.
        if part.tensor in shapes and (part.masked or len(shapes[part.tensor]) > 1):
            touched.setdefault(part.tensor, {}).setdefault(part.dim, []).append(part.index)
    whole = one = 0
    for tensor, dims in touched.items():
        shape = list(shapes[tensor])
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


def _row(group: Group, shapes: Shapes) -> tuple[str, ...]:
    whole, one = parameters(group, shapes)
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
