"""From classes of labels to named groups of channels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_prune.graph.contraction import Call
from lightning_prune.graph.groups import Group, Layer, Slice
from lightning_prune.graph.labels import Freeze, LabelSpace, Span, components_of


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

    @classmethod
    def of(cls, space: LabelSpace, joint: Tensor, frozen: list[Freeze]) -> Classes:
        """Put what the rules and the constraints said into tensors over all ids.

        Args:
            space: what the rules said.
            joint: (ids,) class of every id, constraints included.
            frozen: what else has to stay.
        """
        filters, readers = space.marked("filter"), space.marked("reader")
        masked = ~readers | filters | space.marked("must_mask")
        for span in space.spans:
            if span.buffer:
                masked[span.ids] = False
        reason, reasons = _reasons(joint, [*frozen, *space.frozen])
        return cls(space, joint, components_of(space.count, space.own_pairs), reason, reasons, filters, masked)


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
    order = _filter_order(classes, calls)
    members: dict[int, list[tuple[Span, Tensor]]] = {}
    for key, span, roots in _spans_by_group(classes):
        members.setdefault(key, []).append((span, roots))
    groups = [
        _build_group(classes, spans, calls, norms, module_of, order)
        for spans in members.values()
        if any(classes.filters[span.ids][torch.isin(classes.joint[span.ids], roots)].any() for span, roots in spans)
    ]
    groups.sort(key=lambda item: item[0])
    named = _unique_names([group for _, group, _ in groups])
    return named, {group.name: roots for group, (_, _, roots) in zip(named, groups, strict=True)}


def _spans_by_group(classes: Classes) -> list[tuple[int, Span, Tensor]]:
    """(group key, span, classes of that group in the span): the key is the make-up of a class and its reason."""
    generator = torch.Generator().manual_seed(0)
    make_up = torch.zeros(classes.space.count, dtype=torch.int64)
    weights = torch.randint(-(2**62), 2**62, (len(classes.space.spans),), generator=generator)
    for span, weight in zip(classes.space.spans, weights, strict=True):
        roots = classes.joint[span.ids]
        make_up.index_add_(0, roots, weight.expand(len(roots)))  # a sum modulo 2**64 over (span, count)
    make_up += classes.reason[classes.joint] * 0x9E3779B97F4A7C1
    found = []
    for span in classes.space.spans:
        roots = classes.joint[span.ids]
        keys = make_up[roots]
        found += [(key, span, roots[keys == key].unique()) for key in keys.unique().tolist()]
    return found


def _filter_order(classes: Classes, calls: list[Call]) -> dict[int, int]:
    """When the filters of each own class first ran."""
    order: dict[int, int] = {}
    for call in calls:
        for root in classes.own[call.makes[call.makes >= 0] >> 1].unique().tolist():
            order.setdefault(root, call.order)
    return order


def _build_group(
    classes: Classes,
    spans: list[tuple[Span, Tensor]],
    calls: list[Call],
    norms: list[tuple[str, Tensor]],
    module_of: dict[str, str],
    order: dict[int, int],
) -> tuple[int, Group, Tensor]:
    located = []
    for span, roots in spans:
        entries = torch.isin(classes.joint[span.ids], roots).nonzero().flatten()
        located.append((span, entries, classes.joint[span.ids][entries]))
    channels = torch.cat([roots for _, roots in spans]).unique()  # class ids ascend with their first tensor's entries
    indexed = [
        (span, entries[torch.argsort(roots, stable=True)].view(len(channels), -1)) for span, entries, roots in located
    ]

    filters = []
    for span, index in indexed:
        ids = index + span.start
        if not span.buffer and bool(classes.filters[ids].all()):
            own = classes.own[ids[:, 0]]
            filters.append((order.get(int(own[0]), span.start), span, index, own))
    filters.sort(key=lambda item: item[0])
    layers = tuple(
        _layer(classes, first, span, index, own, channels, calls, norms, module_of)
        for first, span, index, own in filters
    )
    norm_modules = {module for module, _ in norms}
    slices = []
    for span, index in indexed:
        own = classes.own[index[:, 0] + span.start]
        owner = next(
            (layer.name for layer, item in zip(layers, filters, strict=True) if torch.equal(item[3], own)),
            None,
        )
        masked = bool(classes.masked[index + span.start].any())
        norm = module_of.get(span.tensor) in norm_modules
        slices.append(Slice(span.tensor, span.dim, index, masked, owner, norm))
    number = int(classes.reason[channels[0]])
    reason, statistics = classes.reasons[number] if number >= 0 else (None, False)
    if reason is None and len(channels) == 1:
        reason = "has channels that all go together, so that none can"
    group = Group(layers[0].name, len(channels), layers, tuple(slices), reason, statistics)
    return filters[0][0], group, channels


def _layer(
    classes: Classes,
    first: int,
    span: Span,
    index: Tensor,
    own: Tensor,
    channels: Tensor,
    calls: list[Call],
    norms: list[tuple[str, Tensor]],
    module_of: dict[str, str],
) -> Layer:
    # One over a concatenation (DenseNet) normalises several layers: it is none's own.
    norm = next(
        (
            module
            for module, made in norms
            if len(made) == span.size and bool(torch.isin(own, classes.own[made[made >= 0] >> 1]).all())
        ),
        None,
    )
    reader, reader_index = None, None
    for call in calls:
        if call.order <= first:
            continue
        labelled = (call.reads >= 0).nonzero().flatten()
        roots = classes.joint[call.reads[labelled] >> 1]
        mine = torch.isin(roots, channels)
        if mine.any():
            entries, roots = labelled[mine], roots[mine]
            if len(entries) % len(channels) == 0 and len(roots.unique()) == len(channels):
                reader = call.module
                reader_index = entries[torch.argsort(roots, stable=True)].view(len(channels), -1)
            break
    name = module_of.get(span.tensor) or span.tensor
    return Layer(name, span.tensor, span.dim, span.size, index, norm, reader, reader_index)


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
