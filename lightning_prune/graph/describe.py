"""A channel graph in words: the table that people read before they prune."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch

from lightning_prune.graph.computed_weights import is_mask
from lightning_prune.graph.groups import Group

Shapes = Mapping[str, Sequence[int]]  # of every parameter and buffer

HEAD = ("group", "layers", "channels", "parameters", "per channel", "prunable")
LIST = 56  # characters of a list of layers: the table still fits an ordinary terminal


def describe(groups: Sequence[Group], shapes: Shapes, notes: Sequence[str] = ()) -> str:
    """See `ChannelGraph.describe`."""
    rows = [_row(group, shapes) for group in groups]
    table = [*aligned(HEAD, rows), ""] if groups else []
    return "\n".join([*table, totals(groups), *(f"note: {note}" for note in notes)])


def totals(groups: Sequence[Group]) -> str:
    """Say in one sentence how much of a model can be pruned at all."""
    if not groups:
        return "There are no channels to prune: no convolution or linear layer was seen."
    prunable = [group for group in groups if group.prunable]
    all_channels, channels = (sum(group.size for group in some) for some in (groups, prunable))
    all_layers, layers = (len({layer.name for group in some for layer in group.layers}) for some in (groups, prunable))
    return (
        f"{channels:,} of {all_channels:,} channels ({percent(channels, all_channels)}) can be pruned: "
        f"{len(prunable)} of {len(groups)} groups, {layers} of {all_layers} layers."
    )


def nothing_to_prune(groups: Sequence[Group], notes: Sequence[str]) -> str:
    """Say why no channel can go: of every group, and of layers that make no group; with the ways out."""
    reasons = [f"{group.name} {group.reason or 'is ignored'}" for group in groups]
    hints = [note for note in notes if not note.startswith(("never used", "not traced", "no rule"))]
    return "; ".join([*reasons, *hints]) or "it has no layer to prune"


def percent(part: int, whole: int) -> str:
    """A share as people say it; all and nothing are said only where they are exact."""
    if part in (0, whole):
        return "100 %" if part else "0 %"
    return f"{min(99, max(1, round(100 * part / whole)))} %"


def parameters(group: Group, shapes: Shapes) -> tuple[int, int]:
    """Count the parameters that hang on a group, and those that go with its first channel."""
    touched: dict[str, dict[int, list[torch.Tensor]]] = {}
    for part in group.slices:
        # Running statistics are the only flat tensors that masking leaves alone; they are no parameters.
        if part.tensor in shapes and (part.masked or len(shapes[part.tensor]) > 1) and not is_mask(part.tensor, shapes):
            touched.setdefault(part.tensor, {}).setdefault(part.dim, []).append(part.index)

    def count(channels: slice) -> int:
        total = 0
        for tensor, dims in touched.items():
            left = list(shapes[tensor])
            for dim, indices in dims.items():
                left[dim] -= torch.cat([index[channels].flatten() for index in indices]).unique().numel()
            # A weight that both makes and reads the group loses rows and columns, and where they cross only once.
            total += math.prod(shapes[tensor]) - math.prod(left)
        return total

    return count(slice(None)), count(slice(1))


def shortened(names: Sequence[str], limit: int = LIST) -> str:
    """List names up to a length, at least the first; where some are left out, their total follows in brackets."""
    shown = names[0]
    for name in names[1:]:
        if len(shown) + len(name) + 2 > limit:
            return f"{shown} … ({len(names)})"
        shown += f", {name}"
    return shown


def ranges(numbers: Sequence[int], limit: int) -> str:
    """List ascending numbers up to a length, neighbours as one range: ``0-3, 7, 9-12``."""
    parts = [_range(first, last) for first, last in runs(numbers)]
    text = ", ".join(parts)
    while len(text) > limit and len(parts) > 1:
        parts.pop()
        text = f"{', '.join(parts)}, …"
    return text


def renumbered(keep: Sequence[int]) -> str:
    """Say which new numbers ascending old ones have: ``0-3→0-3, 7→4``."""
    parts, new = [], 0
    for first, last in runs(keep):
        parts.append(f"{_range(first, last)}→{_range(new, new + last - first)}")
        new += last - first + 1
    return ", ".join(parts)


def runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last of neighbours in ascending numbers."""
    start = 0
    for end, number in enumerate(numbers, 1):
        if end == len(numbers) or numbers[end] != number + 1:
            yield numbers[start], number
            start = end


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def aligned(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of a table: first and last column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = tuple("-" * width for width in (*widths[:-1], len(head[-1])))
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:-1], widths[1:-1]), row[-1]]).rstrip()
        for row in (head, rule, *rows)
    ]


def _row(group: Group, shapes: Shapes) -> tuple[str, ...]:
    whole, one = parameters(group, shapes)
    verdict = group.verdict
    others = [layer.name for layer in group.layers[1:]]  # the first one is the group's name
    if others:
        verdict += f"{',' if verdict == 'yes' else ';'} together with {shortened(others)}"
    return group.name, str(len(group.layers)), f"{group.size:,}", f"{whole:,}", f"{one:,}", verdict
