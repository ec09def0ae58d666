"""All ids of a model's slices, and what the rules say about them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from lightning_prune.graph.computed_weights import owner
from lightning_prune.graph.constraints import CodeSize, Constraint
from lightning_prune.graph.groups import Group
from lightning_prune.graph.labels import NO_LABEL, Labels, TensorInfo, ids_of
from lightning_prune.graph.means import Mean

Pairs = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Span:
    """The ids of one dimension of one parameter or buffer: ``start .. start + size``."""

    tensor: str
    dim: int
    start: int
    size: int
    buffer: bool

    @property
    def ids(self) -> Tensor:
        """(size,) all of them."""
        return torch.arange(self.start, self.start + self.size)

    @property
    def module(self) -> str:
        """Path of the module that owns the tensor."""
        return owner(self.tensor)


@dataclass(frozen=True)
class Freeze:
    """Ids that must stay, and why.

    statistics: their removal is possible, but changes a statistic. withheld: it is possible where the model was seen
    to run, but not for certain everywhere.
    """

    ids: Tensor
    reason: str
    statistics: bool = False
    withheld: bool = False


@dataclass(frozen=True)
class Contraction:
    """One sum over channels: the module that ran it, when, one of the weight's ids, those that it read and made."""

    module: str
    when: tuple[int, int]  # run, position in it
    weight: int  # -1: of data with data, as in an attention
    reads: Tensor
    makes: Tensor


@dataclass
class LabelSpace:
    """Hands out ids and collects what the rules say about them."""

    count: int = 0
    spans: list[Span] = field(default_factory=list)
    pairs: Pairs = field(default_factory=list)
    own_pairs: Pairs = field(default_factory=list)
    assigned: Pairs = field(default_factory=list)  # of a parameter, and of what the code puts into it
    frozen: list[Freeze] = field(default_factory=list)
    constraints: list[Constraint] = field(default_factory=list)
    sizes: list[CodeSize] = field(default_factory=list)
    contractions: list[Contraction] = field(default_factory=list)
    norms: list[tuple[str, Tensor]] = field(default_factory=list)  # module path, ids of its output's channels
    means: dict[str, Mean] = field(default_factory=dict)  # by module path; decided once everything is recorded
    consistent: dict[Constraint, int | None] = field(default_factory=dict)  # along which axis, whatever is decided
    seen: set[tuple[object, ...]] = field(default_factory=set)  # sizes that some line of code passed
    narrow: frozenset[str] = frozenset()  # types of modules whose heads get narrower, instead of fewer
    whole: set[str] = field(default_factory=set)  # those whose heads go whole
    met: set[str] = field(default_factory=set)  # those in which channels met a tensor of fixed size
    _marks: dict[str, list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.classes = cache(self._classes)

    def label_parameter(
        self, name: str, tensor: Tensor, *, buffer: bool, dims: int | None = None, twin: TensorInfo | None = None
    ) -> TensorInfo:
        """Labels for the first ``dims`` dimensions (kernel positions never go). Buffers are not masked, hence live.

        twin: of a vector whose entries go with this one's anyway (a norm's scale, of its shift): both share ids.
        """
        if twin is not None and twin.labels:
            self.spans.append(Span(name, 0, int(twin.labels[0].ids[0]), len(tensor), buffer))
            return twin
        labels = []
        for dim, size in enumerate(tensor.shape[:dims]):
            if size > 1:  # a single slice can never be removed
                self.spans.append(Span(name, dim, self.count, size, buffer))
                labels.append(Labels.along(Labels(self.fresh(size), buffer), tensor.shape, dim))
        return TensorInfo(tuple(labels))

    def fresh(self, size: int) -> Tensor:
        """New ids; without a span they belong to no tensor (an addition's result, say)."""
        ids = torch.arange(self.count, self.count + size)
        self.count += size
        return ids

    def tie(self, first: Tensor, second: Tensor, *, own: bool = False) -> None:
        """Ids that go together. ``own``: they also belong to the same layer (a filter and its batch norm)."""
        (self.own_pairs if own else self.pairs).append((first.flatten(), second.flatten()))

    def tie_as(self, groups: Iterable[Group]) -> None:
        """Let go together what does in groups that are known from before; tensors that are not here are passed over."""
        spans = {(span.tensor, span.dim): span for span in self.spans}
        for group in groups:
            found = [(spans.get((part.tensor, part.dim)), part.index) for part in group.slices]
            ids = [span.start + index for span, index in found if span is not None and int(index.max()) < span.size]
            for more in ids:
                self.tie(ids[0][:, :1].expand_as(more), more)

    def freeze(self, ids: Tensor, reason: str, *, statistics: bool = False) -> None:
        """Ids that must stay, and why; -1 is ignored."""
        ids = ids_of(ids)
        if len(ids):
            self.frozen.append(Freeze(ids, reason, statistics))

    def mark(self, role: str, ids: Tensor) -> None:
        """Remember a role of slices: ``filter``, ``reader``, ``must_mask`` or ``unmasked``."""
        self._marks.setdefault(role, []).append(ids_of(ids))

    def marked(self, role: str) -> Tensor:
        """Boolean mask over all ids."""
        mask = torch.zeros(self.count, dtype=torch.bool)
        if role in self._marks:
            mask[torch.cat(self._marks[role])] = True
        for target, source in self.assigned if role in ("reader", "must_mask") else ():
            mask[target] |= mask[source]
            if role == "must_mask":
                mask[source] = mask[target]
        return mask

    def any_and_all(self, mask: Tensor) -> tuple[list[bool], list[bool]]:
        """Of every span, whether any, and whether all of its ids are in a boolean mask over all ids."""
        before = torch.cat([torch.zeros(1, dtype=torch.int64), mask.cumsum(0)])
        starts = torch.tensor([span.start for span in self.spans], dtype=torch.int64)
        sizes = torch.tensor([span.size for span in self.spans], dtype=torch.int64)
        found = before[starts + sizes] - before[starts]
        return (found > 0).tolist(), (found == sizes).tolist()

    def fold(self, labels: Labels, keep: Collection[int], where: str) -> Labels | None:
        """The labels along the dimensions ``keep`` only; what varies along the others is tied to go together."""
        kept = [d for d in labels.dims if d in keep]
        others = [d for d in range(labels.ids.dim()) if d not in kept]
        if len(kept) in (0, len(labels.dims)):
            return labels if kept or not labels.dims else None
        shape = labels.ids.shape
        length = torch.Size(shape[d] for d in kept).numel()
        rows = labels.region().map(lambda tensor: tensor.permute(*kept, *others).reshape(length, -1))
        gaps = (rows.ids == NO_LABEL).any(1)
        if gaps.any():
            self.freeze(rows.ids[gaps], f"goes together with channels that stay in {where}")
        whole = rows.ids[~gaps]
        self.tie(whole[:, :1].expand_as(whole), whole)
        live = rows.live.any(1) if rows.live.dim() else rows.live
        view = [shape[d] if d in kept else 1 for d in range(len(shape))]
        folded = Labels(torch.where(gaps, NO_LABEL, rows.ids[:, 0]), live)
        return folded.map(lambda tensor: tensor.view(view).expand(shape))

    def _classes(self, *, own: bool = False) -> Tensor:
        """(count,) the smallest id of the class each id belongs to, once everything is recorded."""
        return joined(torch.arange(self.count), self.own_pairs) if own else joined(self.classes(own=True), self.pairs)


def joined(classes: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """(count,) the smallest id of the class each id belongs to, once these pairs go together too."""
    if not pairs:
        return classes
    first, second = (torch.cat([pair[side] for pair in pairs]) for side in (0, 1))
    parent = classes.clone()
    while True:
        a, b = parent[first], parent[second]
        apart = a != b
        left = int(apart.count_nonzero())
        if not left:
            return parent
        if left < len(a):
            first, second, a, b = first[apart], second[apart], a[apart], b[apart]
        parent.scatter_reduce_(0, torch.maximum(a, b), torch.minimum(a, b), "amin")
        while not torch.equal(grand := parent[parent], parent):
            parent = grand
