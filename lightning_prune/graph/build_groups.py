"""From classes of ids to named groups of channels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lightning_prune.graph.computed_weights import source_of
from lightning_prune.graph.groups import Group, Layer, Slice
from lightning_prune.graph.label_space import Contraction, Freeze, LabelSpace, Span
from lightning_prune.graph.labels import NO_LABEL


class Classes:
    """Per id its class with the constraints and within its layer, its roles, the number of a reason to stay or -1."""

    def __init__(self, space: LabelSpace, joint: Tensor, frozen: Sequence[Freeze], *, allow_statistics: bool) -> None:
        self.space, self.joint, self.own = space, joint, space.classes(own=True)
        self.allow_statistics = allow_statistics
        self.filters = space.marked("filter")
        self.masked = ~space.marked("reader") | self.filters | space.marked("must_mask")
        self.masked &= ~space.marked("unmasked")
        for span in space.spans:
            if span.buffer:
                self.masked[span.ids] = False
        frozen = [*frozen, *space.frozen]
        # Where only a statistic changes comes last.
        found = dict.fromkeys((item.reason, item.statistics, item.withheld) for item in frozen)
        self.reasons = sorted(found, key=lambda of: of[1:])
        number = {reason: position for position, reason in enumerate(self.reasons)}
        first = torch.full((len(joint),), len(number), dtype=torch.int64)
        for item in frozen:
            roots = joint[item.ids]
            first[roots] = first[roots].clamp(max=number[item.reason, item.statistics, item.withheld])
        self.reason = torch.where(first == len(number), -1, first)[joint]
        free = [allow_statistics and statistics for _, statistics, _ in self.reasons]
        may_go = torch.tensor([*free, True])[self.reason]  # -1, no reason, is the last
        self._may_go = torch.cat([may_go, torch.tensor([False])])  # and so is -1, no label
        self.any_filter, self.all_filters = space.any_and_all(self.filters)
        self.any_masked, self.all_masked = space.any_and_all(self.masked)

    def may_go(self, ids: Tensor) -> bool:
        """Whether any of these belongs to channels that can be removed."""
        return bool(self._may_go[ids].any())


@dataclass(frozen=True)
class GroupSpan:
    """Where the channels of one group lie in one tensor dimension: index (channels, k), in the order of the classes."""

    number: int  # of the span
    span: Span
    index: Tensor

    @property
    def ids(self) -> Tensor:
        """(channels, k) label ids."""
        return self.index + self.span.start


def build_groups(classes: Classes) -> dict[Group, Tensor]:
    """Classes with the same make-up (same tensors, same counts) form one group; its channels are those classes."""
    made_up = [(roots, parts) for roots, parts in _made_up(classes) if any(_is_layer(classes, p) for p in parts)]
    finder = LayerFinder(classes, firsts=torch.tensor([int(roots[0]) for roots, _ in made_up]).long())
    groups = [(*_build_group(classes, finder, roots, parts), roots) for roots, parts in made_up]
    groups.sort(key=lambda item: (item[0], int(item[2][0])))
    named = [(group, roots) for _, group, roots in groups]
    weights: dict[str, set[str]] = {}
    for group, _ in named:
        weights.setdefault(group.name, set()).add(group.layers[0].weight)
    named = [(_by_weight(group) if len(weights[group.name]) > 1 else group, roots) for group, roots in named]
    for telling in (_by_filters, _by_dimension):
        names = Counter(group.name for group, _ in named)
        named = [(telling(group) if names[group.name] > 1 else group, roots) for group, roots in named]
    return dict(named)


def _by_weight(group: Group) -> Group:
    """Groups of several weights of one module's own (a cell written by hand, a list of parameters)."""
    return replace(group, name=group.layers[0].weight)


def _by_filters(group: Group) -> Group:
    """Groups that share their first layer are told apart by the filters they hold."""
    index = group.layers[0].index
    return replace(group, name=f"{group.name}[{int(index.min())}:{int(index.max()) + 1}]")


def _by_dimension(group: Group) -> Group:
    """A weight that also works transposed (tied autoencoders) has channels along both of its dimensions."""
    return replace(group, name=f"{group.name[:-1]}, dim {group.layers[0].dim}]")


def _made_up(classes: Classes) -> list[tuple[Tensor, list[GroupSpan]]]:
    """Per group (classes of one make-up, held for one reason) its classes and where they lie; those with filters."""
    spans, joint, filters = classes.space.spans, classes.joint.numpy(), classes.filters.numpy()
    if not spans:
        return []
    # Most spans hold the same classes in the same order (a filter, its norm, its readers): one stands for all.
    alike: dict[bytes, list[int]] = {}
    for number, span in enumerate(spans):
        alike.setdefault(joint[span.start : span.start + span.size].tobytes(), []).append(number)
    bundles = list(alike.values())
    held = [joint[spans[first].start : spans[first].start + spans[first].size] for first, *_ in bundles]
    group_of = _groups_of_classes(classes, held)
    with_filters = {
        group
        for numbers in bundles
        for number in numbers
        if classes.any_filter[number]
        for group in np.unique(group_of[joint[_range(spans[number])][filters[_range(spans[number])]]]).tolist()
    }
    found: dict[int, tuple[Tensor, list[GroupSpan]]] = {}
    for numbers, roots in zip(bundles, held, strict=True):
        groups = group_of[roots]
        single = bool((groups == groups[0]).all())
        for group in [int(groups[0])] if single else np.unique(groups).tolist():
            if group in with_filters:
                mine = np.arange(len(roots)) if single else np.flatnonzero(groups == group)
                order = mine if (np.diff(roots[mine]) > 0).all() else mine[np.argsort(roots[mine], kind="stable")]
                channels, parts = found.setdefault(group, (torch.from_numpy(np.unique(roots[order])), []))
                index = torch.from_numpy(order).view(len(channels), -1)
                same = next((part.index for part in parts[:1] if torch.equal(part.index, index)), index)
                parts += [GroupSpan(number, spans[number], same) for number in numbers]
    for _, parts in found.values():
        parts.sort(key=lambda part: part.number)
    return list(found.values())


def _range(span: Span) -> slice:
    return slice(span.start, span.start + span.size)


def _groups_of_classes(classes: Classes, held: Sequence[np.ndarray]) -> np.ndarray:
    """(ids,) at the smallest id of each class the number of its group: same reason, same entries in the same spans."""
    spans = len(held)
    span_of = np.repeat(np.arange(spans), [len(roots) for roots in held])
    entries, counts = np.unique(np.concatenate(held) * spans + span_of, return_counts=True)  # of (class, span)
    make_up = (entries % spans) * (counts.max() + 1) + counts
    starts = np.flatnonzero(np.diff(entries // spans, prepend=-1))
    owners, lengths = entries[starts] // spans, np.diff(starts, append=len(entries))
    reasons = classes.reason.numpy()[owners]
    # Neighbours mostly are channels of one layer: only the first of a run of equal classes is looked up.
    owner = np.repeat(np.arange(len(owners)), lengths)
    same_place_before = np.arange(len(entries)) - lengths[owner]
    first = np.zeros(len(owners), dtype=bool)
    first[owner[make_up != make_up[same_place_before]]] = True
    first[1:] |= (lengths[1:] != lengths[:-1]) | (reasons[1:] != reasons[:-1])
    first[0] = True
    looked_up = zip(*(values[first].tolist() for values in (reasons, lengths, starts)), strict=True)
    numbers: dict[tuple[int, bytes], int] = {}
    keys = ((reason, make_up[start : start + length].tobytes()) for reason, length, start in looked_up)
    number = np.array([numbers.setdefault(key, len(numbers)) for key in keys])
    group = np.full(classes.space.count, -1)
    group[owners] = number[first.cumsum() - 1]
    return group


def _is_layer(classes: Classes, part: GroupSpan) -> bool:
    """Whether every channel has a filter there."""
    if part.span.buffer or not classes.any_filter[part.number]:
        return False
    return classes.all_filters[part.number] or bool(classes.filters[part.ids].any(1).all())


def _is_masked(classes: Classes, part: GroupSpan) -> bool:
    if classes.any_masked[part.number] == classes.all_masked[part.number]:
        return classes.any_masked[part.number]
    return bool(classes.masked[part.ids].any())


def _build_group(
    classes: Classes, finder: LayerFinder, channels: Tensor, parts: list[GroupSpan]
) -> tuple[tuple[int, int], Group]:
    """When its first layer ran, and the group."""
    layers_of = [part for part in parts if _is_layer(classes, part)]
    found = sorted(((finder.order(p), p) for p in layers_of), key=lambda item: item[0])
    layers = tuple(finder.layer(order, part, channels) for order, part in found)
    owner_of = finder.owners(layers, [part for _, part in found])
    slices = tuple(
        Slice(
            p.span.tensor,
            p.span.dim,
            p.index,
            masked=_is_masked(classes, p),
            layer=owner_of(p),
            norm=not p.span.buffer and p.span.module in finder.norm_modules,
        )
        for p in parts
    )
    number = int(classes.reason[channels[0]])
    reason, statistics, withheld = classes.reasons[number] if number >= 0 else (None, False, False)
    if len(channels) == 1 and (reason is None or statistics):
        reason, statistics = "has channels that all go together, so that none can", False
    held = None if statistics and classes.allow_statistics else reason
    return found[0][0], Group(
        layers[0].name, len(channels), layers, slices, held, reason if statistics else None, withheld
    )


class LayerFinder:
    """Says of filters which layer they are, which batch norm is theirs and who reads them first."""

    def __init__(self, classes: Classes, firsts: Tensor) -> None:  # of each group's channels the first one's class
        space = classes.space
        self.classes = classes
        self.norm_modules = {module for module, _ in space.norms}
        self._joint, self._own = classes.joint.numpy(), classes.own.numpy()
        self._span = np.full(space.count, -1)
        for number, span in enumerate(space.spans):
            self._span[span.start : span.start + span.size] = number
        # By the very ids, and for what was computed from others by their class: of two copies of a network, one an
        # average of the other, all lie in one class, although each has norms and readers of its own.
        self._made, self._made_in = np.full(space.count, -1), np.full(space.count, -1)
        self._readers: dict[int, list[Contraction]] = {}
        wanted = np.zeros(space.count, dtype=bool)
        wanted[firsts.numpy()] = True
        for number, contraction in reversed(list(enumerate(space.contractions))):
            makes, reads = contraction.makes.numpy(), contraction.reads.numpy()
            self._made[makes[makes >= 0]] = self._made_in[self._own[makes[makes >= 0]]] = number
            roots = self._joint[reads[reads >= 0]]
            for root in {*roots[wanted[roots]].tolist()}:
                self._readers.setdefault(root, []).insert(0, contraction)
        # One over a concatenation (DenseNet) normalises several layers: it is none's own, hence by size.
        self._norms: dict[tuple[int, int], str] = {}
        self._norms_in: dict[tuple[int, int], str] = {}
        for module, made in space.norms:
            ids = made[made >= 0].numpy()
            if len(ids):
                self._norms.setdefault((int(ids[0]), len(made)), module)
            if len(ids) and not classes.filters[ids[0]]:
                self._norms_in.setdefault((int(self._own[ids[0]]), len(made)), module)

    def _first(self, part: GroupSpan) -> int:
        return part.span.start + int(part.index[0, 0])

    def owners(self, layers: Sequence[Layer], parts: Sequence[GroupSpan]) -> Callable[[GroupSpan], str | None]:
        """Says of a part of the group which of its layers, here with the parts that hold their filters, it is of."""
        by_class: dict[int, list[Layer]] = {}
        for layer, part in zip(layers, parts, strict=True):
            by_class.setdefault(int(self._own[self._first(part)]), []).append(layer)

        def owner_of(part: GroupSpan) -> str | None:
            near = by_class.get(int(self._own[self._first(part)]), [])
            mine = [layer for layer in near if part.span.module in (layer.name, layer.norm)] if len(near) > 1 else near
            return (mine or near)[-1].name if near else None

        return owner_of

    def order(self, part: GroupSpan) -> tuple[int, int]:
        """When these filters first ran: run, position in it."""
        number = int(self._made[self._first(part)])
        number = int(self._made_in[self._own[self._first(part)]]) if number < 0 else number
        return self.classes.space.contractions[number].when if number >= 0 else (0, part.span.start)

    def layer(self, order: tuple[int, int], part: GroupSpan, channels: Tensor) -> Layer:
        """The layer that these filters are."""
        span = part.span
        readers = self._readers.get(int(channels[0]), [])
        reader = next((one for one in readers if one.when > order and one.when[0] == order[0]), None)
        path = None if reader is None else self._reader_path(reader)
        index = None if reader is None or path is None else self._reader_index(reader, channels)
        return Layer(
            span.module or source_of(span.tensor) or span.tensor,
            span.tensor,
            span.dim,
            span.size,
            part.index,
            norm=self._norms.get((span.start, span.size))
            or self._norms_in.get((int(self._own[span.start]), span.size)),
            reader=None if index is None else path,
            reader_index=index,
        )

    def _reader_path(self, reader: Contraction) -> str | None:
        """The layer whose weight reads, which another module's code may use (``F.linear(x, self.head.weight)``)."""
        if reader.weight == NO_LABEL:
            return None
        number = int(self._span[reader.weight])
        return reader.module if number < 0 else self.classes.space.spans[number].module  # -1: of several parameters

    def _reader_index(self, reader: Contraction, channels: Tensor) -> Tensor | None:
        """(channels, r) entries of the reader's input; None if it does not read all channels alike."""
        reads = reader.reads.numpy()
        entries = np.flatnonzero(reads >= 0)
        roots = self._joint[reads[entries]]
        if len(roots) != len(channels) or not np.array_equal(roots, channels.numpy()):
            mine = np.isin(roots, channels.numpy())
            entries, roots = entries[mine], roots[mine]
            if len(entries) % len(channels) or len(np.unique(roots)) != len(channels):
                return None
            entries = entries[np.argsort(roots, kind="stable")]
        return torch.from_numpy(entries).view(len(channels), -1)
