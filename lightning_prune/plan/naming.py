"""Groups of a model that became smaller, by the names that they had in the dense one."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lightning_prune.graph import ChannelGraph, Group
from lightning_prune.plan.plan import Plan

Place = tuple[str, int, tuple[int, ...]]  # a weight, its output dimension, the first filter of every channel


def named_as_dense(graph: ChannelGraph, dense: ChannelGraph, built: Plan) -> ChannelGraph:
    """The graph of a reconstructed model, its groups named as those of the dense model whose channels they hold.

    Groups that share a layer are named by the filters they hold (``conv2[24:32]``), which move up as others go.

    Args:
        graph: of the model as it is now.
        dense: of the dense model.
        built: what it has lost.
    """
    was = {place: group.name for group, place in _places_left(dense, built)}
    names = {}
    for group in graph.groups:
        found = (was.get((layer.weight, layer.dim, _firsts(layer.index))) for layer in group.layers)
        names[group.name] = next(filter(None, found), None)
    taken = set(names.values())
    # One that had no counterpart, a tensor of another name say, keeps its own unless that now means another.
    return graph.renamed({own: name or (f"{own} (new)" if own in taken else own) for own, name in names.items()})


def _places_left(dense: ChannelGraph, built: Plan) -> Iterator[tuple[Group, Place]]:
    """Where the filters that are left of each dense group lie now."""
    removed = {name: torch.tensor(group.removed, dtype=torch.long) for name, group in built.groups.items()}
    kept = {(cut.tensor, cut.dim): cut.keep for cut in dense.cuts(removed)}
    for group in dense.groups:
        left = torch.tensor(built.groups[group.name].keep if group.name in built.groups else range(group.size))
        for layer in group.layers:
            firsts = layer.index[left, 0]
            keep = kept.get((layer.weight, layer.dim))
            firsts = firsts if keep is None else torch.searchsorted(keep, firsts)
            yield group, (layer.weight, layer.dim, tuple(firsts.tolist()))


def _firsts(index: torch.Tensor) -> tuple[int, ...]:
    return tuple(index[:, 0].tolist())
