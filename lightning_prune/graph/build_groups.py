"""From classes of labels to named groups of channels."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_prune.graph.contraction import Call
from lightning_prune.graph.groups import Group, Layer, Slice
from lightning_prune.graph.labels import Freeze, LabelSpace, Span, ids_of


@dataclass
class Classes:
    """Everything the rules said, resolved: per id its class, its layer's own class, roles and reasons."""

    space: LabelSpace
    joint: Tensor
    own: Tensor
    reason: Tensor
    reasons: list[tuple[str, bool]]
    filters: Tensor
    masked: Tensor
    allow_statistics: bool

    @classmethod
    def of(cls, space: LabelSpace, joint: Tensor, frozen: list[Freeze], *, allow_statistics: bool = False) -> Classes:
        """Put what the rules and the constraints said into tensors over all ids.

        Args:
            space: what the rules said.
            joint: (ids,) class of every id, constraints included.
            frozen: what else has to stay.
            allow_statistics: channels that only a statistic holds may go.
        """
        filters, readers = space.marked("filter"), space.marked("reader")
        masked = ~readers | filters | space.marked("must_mask")
        for span in space.spans:
            if span.buffer:
                masked[span.ids] = False
        reason, reasons = _reasons(joint, [*frozen, *space.frozen])
        own = space.classes(own=True)
        return cls(space, joint, own, reason, reasons, filters, masked, allow_statistics)

    def may_go(self, values: Tensor) -> bool:
        """Whether any of these label values belongs to channels that can be removed."""
        numbers = self.reason[ids_of(values)]
        return any(
            number < 0 or (self.allow_statistics and self.reasons[number][1]) for number in numbers.unique().tolist()
        )


def _reasons(joint: Tensor, frozen: list[Freeze]) -> tuple[Tensor, list[tuple[str, bool]]]:
    """Per id the number of the first reason that holds its class, or -1; a statistic only if there is no other."""
    texts = list(dict.fromkeys((item.reason, item.statistics) for item in frozen))
    texts.sort(key=lambda text: text[1])
    number = {text: position for position, text in enumerate(texts)}
    first = torch.full((len(joint),), len(texts), dtype=torch.int64)
    for item in frozen:
        roots = joint[item.ids]
        first[roots] = first[roots].clamp(max=number[item.reason, item.statistics])
    first = first[joint]
    first[first == len(texts)] = -1
    return first, texts


@dataclass(frozen=True)
class Member:
    """Where the classes of one group lie in one tensor dimension: index (channels, k), in the order of the classes."""

    span: Span
    index: Tensor

    @property
    def ids(self) -> Tensor:
        """(channels, k) label ids."""
        return self.index + self.span.start


def build_groups(
    classes: Classes, calls: list[Call], norms: list[tuple[str, Tensor]], module_of: dict[str, str]
) -> tuple[list[Group], dict[str, Tensor]]:
    """Classes with the same make-up (same tensors, same counts) form one group; its channels are those classes.

    Returns the groups and, per group name, the class of each of its channels.

    Args:
        classes: what the rules and constraints said.
        calls: every convolution and matrix product, in order.
        norms: every batch norm in order: module path and its output's label values.
        module_of: module path that owns each parameter.
    """
    members = {key: found for key, found in _members(classes).items() if any(_is_layer(classes, m) for m in found[1])}
    firsts = torch.tensor([int(roots[0]) for roots, _ in members.values()], dtype=torch.int64)
    layers = LayerFinder(classes, calls, norms, module_of, firsts)
    groups = [(*_build_group(classes, layers, roots, parts), roots) for roots, parts in members.values()]
    groups.sort(key=lambda item: item[0])
    named = _unique_names([group for _, group, _ in groups])
    return named, {group.name: roots for group, (_, _, roots) in zip(named, groups, strict=True)}


def _members(classes: Classes) -> dict[int, tuple[Tensor, list[Member]]]:
    """Per group (classes of one make-up, held for one reason) its classes and where they lie; those with filters."""
    spans = classes.space.spans
    if not spans:
        return {}
    ids = torch.cat([torch.arange(span.start, span.start + span.size) for span in spans])
    sizes = torch.tensor([span.size for span in spans])
    span_of = torch.repeat_interleave(torch.arange(len(spans)), sizes)
    roots = classes.joint[ids]
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(2**62), 2**62, (len(spans),), generator=generator)
    make_up = torch.zeros(classes.space.count, dtype=torch.int64)
    make_up.index_add_(0, roots, weights[span_of])  # a sum modulo 2**64 over (span, count)
    make_up += classes.reason * 0x9E3779B97F4A7C1
    keys = make_up[roots]
    wanted = torch.isin(keys, keys[classes.filters[ids]].unique())
    ids, span_of, roots, keys = ids[wanted], span_of[wanted], roots[wanted], keys[wanted]
    # By key, span, class, entry; entries already ascend.
    groups = keys.unique(return_inverse=True)[1]
    order = torch.argsort((groups * len(spans) + span_of) * classes.space.count + roots, stable=True)
    ids, span_of, roots, keys = ids[order], span_of[order], roots[order], keys[order]
    changes = (keys[1:] != keys[:-1]) | (span_of[1:] != span_of[:-1])
    bounds = [0, *(changes.nonzero().flatten() + 1).tolist(), len(ids)]
    found: dict[int, tuple[Tensor, list[Member]]] = {}
    for start, end in itertools.pairwise(bounds):
        span = spans[int(span_of[start])]
        channels, parts = found.setdefault(int(keys[start]), (roots[start:end].unique(), []))
        index = (ids[start:end] - span.start).view(len(channels), -1)
        same = next((part.index for part in parts[:1] if torch.equal(part.index, index)), index)
        parts.append(Member(span, same))
    return found


def _is_layer(classes: Classes, member: Member) -> bool:
    """Whether every channel has a filter there."""
    return not member.span.buffer and bool(classes.filters[member.ids].any(1).all())


def _build_group(
    classes: Classes, finder: LayerFinder, channels: Tensor, members: list[Member]
) -> tuple[tuple[int, int], Group]:
    filters = [m for m in members if _is_layer(classes, m)]
    found = sorted(((finder.order(m), m) for m in filters), key=lambda item: item[0])
    layers = tuple(finder.layer(order, m, channels) for order, m in found)
    owners = {int(classes.own[m.ids[0, 0]]): layer.name for layer, (_, m) in zip(layers, found, strict=True)}
    slices = tuple(
        Slice(
            m.span.tensor,
            m.span.dim,
            m.index,
            bool(classes.masked[m.ids].any()),
            owners.get(int(classes.own[m.ids[0, 0]])),
            finder.module_of.get(m.span.tensor) in finder.norm_modules,
        )
        for m in members
    )
    number = int(classes.reason[channels[0]])
    reason, statistics = classes.reasons[number] if number >= 0 else (None, False)
    if len(channels) == 1 and (reason is None or statistics):
        reason, statistics = "has channels that all go together, so that none can", False
    changed = reason if statistics else None
    held = None if statistics and classes.allow_statistics else reason
    return found[0][0], Group(layers[0].name, len(channels), layers, slices, held, changed)


class LayerFinder:
    """Says of filters which layer they are, which batch norm is theirs and who reads them first.

    Args:
        classes: what the rules said.
        calls: every convolution and matrix product, in order.
        norms: every batch norm in order: module path and its output's label values.
        module_of: module path that owns each parameter.
        firsts: (groups,) the class of each group's first channel.
    """

    def __init__(
        self,
        classes: Classes,
        calls: list[Call],
        norms: list[tuple[str, Tensor]],
        module_of: dict[str, str],
        firsts: Tensor,
    ) -> None:
        self.classes = classes
        self.module_of = module_of
        self.norm_modules = {module for module, _ in norms}
        self._calls = calls
        self._made = torch.full((classes.space.count,), -1)
        self._readers: dict[int, list[Call]] = {}
        wanted = torch.zeros(classes.space.count, dtype=torch.bool)
        wanted[firsts] = True
        for number, call in reversed(list(enumerate(calls))):
            self._made[classes.own[call.makes[call.makes >= 0] >> 1]] = number
            roots = classes.joint[call.reads[call.reads >= 0] >> 1]
            for root in roots[wanted[roots]].unique().tolist():
                self._readers.setdefault(root, []).insert(0, call)
        # One over a concatenation (DenseNet) normalises several layers: it is none's own, hence by size.
        self._norms: dict[tuple[int, int], str] = {}
        for module, made in norms:
            own = classes.own[made[made >= 0] >> 1]
            if len(own):
                self._norms.setdefault((int(own[0]), len(made)), module)

    def order(self, member: Member) -> tuple[int, int]:
        """When these filters first ran: run, position in it."""
        number = int(self._made[self.classes.own[member.ids[0, 0]]])
        return self._calls[number].when if number >= 0 else (0, member.span.start)

    def layer(self, order: tuple[int, int], member: Member, channels: Tensor) -> Layer:
        """The layer of these filters, which first ran at ``order``."""
        span = member.span
        first = int(self.classes.own[span.start])
        calls = self._readers.get(int(channels[0]), [])
        reader = next((call for call in calls if call.when > order and call.when[0] == order[0]), None)
        name = self.module_of.get(span.tensor) or span.tensor
        norm = self._norms.get((first, span.size))
        index = None if reader is None else self._reader_index(reader, channels)
        path = None if reader is None or index is None else reader.module
        return Layer(name, span.tensor, span.dim, span.size, member.index, norm, path, index)

    def _reader_index(self, call: Call, channels: Tensor) -> Tensor | None:
        labelled = (call.reads >= 0).nonzero().flatten()
        roots = self.classes.joint[call.reads[labelled] >> 1]
        mine = torch.isin(roots, channels)
        entries, roots = labelled[mine], roots[mine]
        if len(entries) % len(channels) or len(roots.unique()) != len(channels):
            return None
        return entries[torch.argsort(roots, stable=True)].view(len(channels), -1)


def _unique_names(groups: list[Group]) -> list[Group]:
    """Groups that share their first layer are told apart by the filters they hold."""
    seen: dict[str, int] = {}
    for group in groups:
        seen[group.name] = seen.get(group.name, 0) + 1
    named = []
    for group in groups:
        name = group.name
        if seen[name] > 1:
            index = group.layers[0].index
            name = f"{name}[{int(index.min())}:{int(index.max()) + 1}]"
        named.append(replace(group, name=name))
    return named
