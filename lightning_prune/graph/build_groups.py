"""From classes of ids to named groups of channels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_prune.graph.computed_weights import source_of
from lightning_prune.graph.groups import Group, Layer, Slice
from lightning_prune.graph.label_space import Contraction, Freeze, LabelSpace, Span


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

    def may_go(self, ids: Tensor) -> bool:
        """Whether any of these belongs to channels that can be removed."""
        numbers = self.reason[ids[ids >= 0]].unique().tolist()
        return any(number < 0 or (self.allow_statistics and self.reasons[number][1]) for number in numbers)


@dataclass(frozen=True)
class GroupSpan:
    """Where the channels of one group lie in one tensor dimension: index (channels, k), in the order of the classes."""

    span: Span
    index: Tensor

    @property
    def ids(self) -> Tensor:
        """(channels, k) label ids."""
        return self.index + self.span.start


def build_groups(classes: Classes) -> dict[Group, Tensor]:
    """Classes with the same make-up (same tensors, same counts) form one group; its channels are those classes."""
    made_up = [(roots, parts) for roots, parts in _made_up(classes) if any(_is_layer(classes, p) for p in parts)]
    finder = _LayerFinder(classes, firsts=torch.tensor([int(roots[0]) for roots, _ in made_up]).long())
    groups = [(*_build_group(classes, finder, roots, parts), roots) for roots, parts in made_up]
    groups.sort(key=lambda item: (item[0], int(item[2][0])))
    names = Counter(group.name for _, group, _ in groups)
    return {_renamed(group) if names[group.name] > 1 else group: roots for _, group, roots in groups}


def _renamed(group: Group) -> Group:
    """Groups that share their first layer are told apart by the filters they hold."""
    index = group.layers[0].index
    return replace(group, name=f"{group.name}[{int(index.min())}:{int(index.max()) + 1}]")


def _made_up(classes: Classes) -> list[tuple[Tensor, list[GroupSpan]]]:
    """Per group (classes of one make-up, held for one reason) its classes and where they lie; those with filters."""
    spans = classes.space.spans
    if not spans:
        return []
    ids = torch.cat([span.ids for span in spans])
    span_of = torch.repeat_interleave(torch.arange(len(spans)), torch.tensor([span.size for span in spans]))
    group = _groups_of_classes(classes, ids, span_of)[classes.joint[ids]]
    wanted = torch.isin(group, group[classes.filters[ids]].unique())
    ids = ids[wanted]
    # By group, span, class, entry; entries already ascend.
    place = group[wanted] * len(spans) + span_of[wanted]
    ids = ids[torch.argsort(place * classes.space.count + classes.joint[ids], stable=True)]
    places, lengths = place.unique(return_counts=True)
    found: dict[int, tuple[Tensor, list[GroupSpan]]] = {}
    for own, entries in zip(places.tolist(), ids.split(lengths.tolist()), strict=True):
        span = spans[own % len(spans)]
        channels, parts = found.setdefault(own // len(spans), (classes.joint[entries].unique(), []))
        index = (entries - span.start).view(len(channels), -1)
        same = next((part.index for part in parts[:1] if torch.equal(part.index, index)), index)
        parts.append(GroupSpan(span, same))
    return list(found.values())


def _groups_of_classes(classes: Classes, ids: Tensor, span_of: Tensor) -> Tensor:
    """(ids,) at the smallest id of each class the number of its group: same reason, same entries in the same spans."""
    spans = len(classes.space.spans)
    entries, counts = torch.unique(classes.joint[ids] * spans + span_of, return_counts=True)  # of (class, span)
    owners, lengths = torch.unique_consecutive(entries // spans, return_counts=True)
    make_up = (entries % spans) * (int(counts.max()) + 1) + counts
    reasons = classes.reason[owners]
    # Neighbours mostly are channels of one layer: only the first of a run of equal classes is looked up.
    owner = torch.repeat_interleave(lengths)
    same_place_before = torch.arange(len(entries)) - lengths[owner]
    first = torch.zeros(len(owners), dtype=torch.bool)
    first[owner[make_up != make_up[same_place_before]]] = True
    first[1:] |= (lengths[1:] != lengths[:-1]) | (reasons[1:] != reasons[:-1])
    first[0] = True
    looked_up = zip(*(values[first].tolist() for values in (reasons, lengths, lengths.cumsum(0))), strict=True)
    numbers: dict[tuple[int, bytes], int] = {}
    keys = ((reason, make_up[end - length : end].numpy().tobytes()) for reason, length, end in looked_up)
    number = torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys])
    group = torch.full((classes.space.count,), -1)
    group[owners] = number[first.cumsum(0) - 1]
    return group


def _is_layer(classes: Classes, part: GroupSpan) -> bool:
    """Whether every channel has a filter there."""
    return not part.span.buffer and bool(classes.filters[part.ids].any(1).all())


def _build_group(
    classes: Classes, finder: _LayerFinder, channels: Tensor, parts: list[GroupSpan]
) -> tuple[tuple[int, int], Group]:
    """When its first layer ran, and the group."""
    found = sorted(((finder.order(p), p) for p in parts if _is_layer(classes, p)), key=lambda item: item[0])
    layers = tuple(finder.layer(order, part, channels) for order, part in found)
    owners = {_own(classes, part): layer.name for layer, (_, part) in zip(layers, found, strict=True)}
    slices = tuple(
        Slice(
            p.span.tensor,
            p.span.dim,
            p.index,
            masked=bool(classes.masked[p.ids].any()),
            layer=owners.get(_own(classes, p)),
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


def _own(classes: Classes, part: GroupSpan) -> int:
    return int(classes.own[part.ids[0, 0]])


class _LayerFinder:
    """Says of filters which layer they are, which batch norm is theirs and who reads them first."""

    def __init__(self, classes: Classes, firsts: Tensor) -> None:  # of each group's channels the first one's class
        space = classes.space
        self.classes = classes
        self.norm_modules = {module for module, _ in space.norms}
        self._made = torch.full((space.count,), -1)
        self._readers: dict[int, list[Contraction]] = {}
        wanted = torch.zeros(space.count, dtype=torch.bool)
        wanted[firsts] = True
        for number, contraction in reversed(list(enumerate(space.contractions))):
            self._made[classes.own[contraction.makes[contraction.makes >= 0]]] = number
            roots = classes.joint[contraction.reads[contraction.reads >= 0]]
            for root in roots[wanted[roots]].unique().tolist():
                self._readers.setdefault(root, []).insert(0, contraction)
        # One over a concatenation (DenseNet) normalises several layers: it is none's own, hence by size.
        self._norms: dict[tuple[int, int], str] = {}
        for module, made in space.norms:
            own = classes.own[made[made >= 0]]
            if len(own):
                self._norms.setdefault((int(own[0]), len(made)), module)

    def order(self, part: GroupSpan) -> tuple[int, int]:
        """When these filters first ran: run, position in it."""
        number = int(self._made[_own(self.classes, part)])
        return self.classes.space.contractions[number].when if number >= 0 else (0, part.span.start)

    def layer(self, order: tuple[int, int], part: GroupSpan, channels: Tensor) -> Layer:
        span = part.span
        readers = self._readers.get(int(channels[0]), [])
        reader = next((one for one in readers if one.when > order and one.when[0] == order[0]), None)
        index = None if reader is None else self._reader_index(reader, channels)
        return Layer(
            span.module or source_of(span.tensor) or span.tensor,
            span.tensor,
            span.dim,
            span.size,
            part.index,
            norm=self._norms.get((int(self.classes.own[span.start]), span.size)),
            reader=None if reader is None or index is None else reader.module,
            reader_index=index,
        )

    def _reader_index(self, reader: Contraction, channels: Tensor) -> Tensor | None:
        """(channels, r) entries of the reader's input; None if it does not read all channels alike."""
        labelled = (reader.reads >= 0).nonzero().flatten()
        roots = self.classes.joint[reader.reads[labelled]]
        mine = torch.isin(roots, channels)
        entries, roots = labelled[mine], roots[mine]
        if len(entries) % len(channels) or len(roots.unique()) != len(channels):
            return None
        return entries[torch.argsort(roots, stable=True)].view(len(channels), -1)
