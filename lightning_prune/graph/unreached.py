"""Modules and parameters that no recorded run used: whatever reads or makes channels there must keep working.

Nothing is known of what they are connected to, but a module's code mostly calls its children on what their siblings
read and make. Where a sibling is built alike (a second batch norm for another domain, a branch of the same shape) the
unreached one loses the same channels, and all channels of the sizes in question that meet at the siblings go together:
wherever among them it is put, the same indices are gone. Where none is, these channels stay.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from lightning_prune.errors import UnreachedWarning
from lightning_prune.graph.constraints import CodeSize, Constraint, GroupedConvolution
from lightning_prune.graph.describe import shortened
from lightning_prune.graph.label_space import LabelSpace, Span
from lightning_prune.graph.labels import NO_LABEL
from lightning_prune.graph.parts import LISTS, Part, Parts
from lightning_prune.graph.readers import input_dim
from lightning_prune.graph.resolve import resolve

C = TypeVar("C", CodeSize, Constraint)
Ends = Callable[[str], list[Tensor]]
NO_MATTER = {"training", "eps", "momentum", "p", "inplace", "stride", "padding", "dilation", "output_padding"}


@dataclass(frozen=True)
class Unreached:
    """A module or parameter that no trace has used.

    Attributes:
        path: its path.
        twin: the sibling that is built alike, whose channels it loses too; None: its siblings' channels stay.
    """

    path: str
    twin: str | None = None


def meet_unreached(
    space: LabelSpace,
    model: nn.Module,
    names: Mapping[int, str],
    used: Collection[str],
    averaged: Collection[str],
    ends: Ends,
) -> tuple[Unreached, ...]:
    """Tie or freeze what unreached modules may meet.

    names: by identity of the tensor. used: names of tensors that meet data. averaged: of those
    that an operator saw, but no data met. ends: the channels that entered or left a module.
    """
    known = {span.tensor for span in space.spans}
    if not used or not (known - {*used}):
        return ()
    tied = torch.zeros(space.count, dtype=torch.bool)
    for first, second in (*space.pairs, *space.own_pairs):
        tied[first] = tied[second] = True
    seen = {span.tensor for span, any_tied in zip(space.spans, space.any_and_all(tied)[0], strict=True) if any_tied}
    used = {*used, *(seen - {*averaged})}  # some are seen under another identity only, through ``.data``
    joint = resolve(space, {}).joint  # averages follow those that are used
    met = torch.cat([span.ids for span in space.spans if span.tensor in used])
    meets = torch.zeros(space.count, dtype=torch.bool)
    meets[joint[met]] = True
    together, _ = space.any_and_all(meets[joint])
    used = {*used, *(span.tensor for span, with_used in zip(space.spans, together, strict=True) if with_used)}
    tree = Parts(model, names, known, used)
    found = list(tree.unreached(""))
    return _Meeting(space, tree, found, ends).settled() if found else ()


class _Meeting:
    """All unreached parts of one model, and the channels that they may meet."""

    def __init__(self, space: LabelSpace, tree: Parts, parts: list[Part], ends: Ends) -> None:
        self.space, self.tree, self.parts, self._ends = space, tree, parts, ends
        self.joint = resolve(space, {}).joint
        grouped = (item for item in space.constraints if isinstance(item, GroupedConvolution))
        self._grouped = {int(item.inner[0]): item.reads.flatten() for item in grouped}
        unreached = {tensor for part in parts for tensor in part.tensors}
        self.spans: dict[str, list[Span]] = {}
        for span in space.spans:
            self.spans.setdefault(span.tensor, []).append(span)
        self._reached = torch.zeros(space.count, dtype=torch.bool)
        for span in space.spans:
            self._reached[span.ids] = span.tensor not in unreached
        frozen = [item.ids for item in space.frozen if not item.statistics]
        self._frozen = torch.zeros(space.count, dtype=torch.bool)
        self._frozen[self.joint[torch.cat([*frozen, torch.arange(0)])]] = True
        self._unread = torch.ones(space.count, dtype=torch.bool)  # made for an unreached module, maybe
        self._unread[self.joint[space.marked("reader")]] = False
        self._changed: list[Tensor] = []

    def settled(self) -> tuple[Unreached, ...]:
        """Every part tied or its channels frozen."""
        found = [Unreached(part.path, self._meet(part)) for part in self.parts]
        if self._changed:
            self.space.classes.cache_clear()
            joint = resolve(self.space, {}).joint
            # What an unseen path makes of a masked channel need not be zero.
            changed = torch.zeros(self.space.count, dtype=torch.bool)
            changed[joint[torch.cat(self._changed)]] = True
            changed = changed[joint]
            self.space.mark("must_mask", (changed & self.space.marked("reader")).nonzero().flatten())
        return tuple(found)

    def _meet(self, part: Part) -> str | None:
        owner = self.tree.owner(part)
        siblings = list(self.tree.siblings(owner, part))
        met = [*(ids for one in siblings for ids in self._boundary(one, frozen=True)), *self._ends(owner)]
        alike = sorted((s for s in siblings if self._alike(part, s)), key=lambda s: s.container != part.container)
        if not alike:
            self._freeze(part, met)
            return None
        twin = alike[0]
        self._tie(part, twin)
        if not self._belongs(part, twin):
            for size in {len(ids) for ids in self._boundary(twin)}:
                first, *others = (ids for ids in met if len(ids) == size)
                for other in others:
                    self._tie_or_freeze(first, other)
        self._changed += [span.ids for span in self._all_spans(twin)]
        return twin.path

    def _alike(self, part: Part, other: Part) -> bool:
        """Whether two parts are of the same types, with the same tensors and settings."""
        if part.module is None or other.module is None:
            lists = isinstance(self.tree.modules[part.container], (nn.ParameterList, nn.ParameterDict))
            same = part.module is other.module and part.container == other.container
            return lists and same and self._sizes(part) == self._sizes(other)
        mine, others = (list(one.module.named_modules()) for one in (part, other) if one.module is not None)
        return (
            len(part.tensors) == len(other.tensors)
            and [path for path, _ in mine] == [path for path, _ in others]
            and all(_same_settings(a, b) for (_, a), (_, b) in zip(mine, others, strict=True))
            and [self._sizes_of(name) for name in part.tensors] == [self._sizes_of(name) for name in other.tensors]
        )

    def _belongs(self, part: Part, twin: Part) -> bool:
        """Whether it can only belong to the twin's channels: one of several norms or parameters in a list."""
        listed = isinstance(self.tree.modules[part.container], LISTS) and part.container == twin.container
        return listed and (part.module is None or isinstance(part.module, _NormBase))

    def _tie(self, part: Part, twin: Part) -> None:
        """Let a part lose what its twin loses."""
        filters = self.space.marked("filter")
        own = not any(bool(filters[span.ids].any()) for span in self._all_spans(twin))  # a norm, of some layer
        for mine, other in zip(self._all_spans(part), self._all_spans(twin), strict=True):
            self.space.tie(other.ids, mine.ids, own=own)
        self.space.norms += [
            (part.path + module.removeprefix(twin.path), ids)
            for module, ids in self.space.norms
            if _within(module, twin.path)
        ]
        self.space.sizes += list(_moved(self.space.sizes, twin.path, part.path))
        self.space.constraints += list(_moved(self.space.constraints, twin.path, part.path))

    def _freeze(self, part: Part, met: list[Tensor]) -> None:
        """Keep those of the channels around it that are of its sizes; else those that may add up to them."""
        there = {len(ids) for ids in met}
        sizes = {size for name in part.tensors for size in self._sizes_of(name)}
        reads = _input_size(part.module)
        if reads is not None:
            sizes.add(reads)
            if reads not in there and not self._made_before(part, reads):  # flattened, cut, or joined with others
                sizes |= {size for size in there if reads % size == 0 or size % reads == 0 or reads - size in there}
        for ids in met:
            if len(ids) in sizes:
                self.space.freeze(ids, f"may be read or made by {part.path!r}, which no trace has reached")

    def _made_before(self, part: Part, size: int) -> bool:
        """Whether another unreached part, called by the same code and right before, may make so many channels."""
        before = self.parts[: self.parts.index(part)][-1:]
        return any(
            self.tree.owner(other) == self.tree.owner(part)
            and size in (of for sizes in self._sizes(other) for of in sizes)
            for other in before
        )

    def _tie_or_freeze(self, first: Tensor, second: Tensor) -> None:
        both = (first != NO_LABEL) & (second != NO_LABEL)
        self.space.tie(first[both], second[both])
        for ids in (first, second):
            self.space.freeze(ids[~both], "is of the size of channels that stay and that an unreached module may read")

    def _boundary(self, part: Part, *, frozen: bool = False) -> list[Tensor]:
        """The channels that a part has in common with others; ``frozen``: also those that stay or that nobody reads."""
        spans = self._all_spans(part)
        inside = torch.zeros(self.space.count, dtype=torch.bool)
        inside[torch.cat([span.ids for span in spans])] = True
        meets = torch.zeros(self.space.count, dtype=torch.bool)
        meets[self.joint[self._reached & ~inside]] = True
        if frozen:
            meets |= self._frozen | self._unread
        found = [span.ids for span in spans if bool(meets[self.joint[span.ids]].any())]
        # The weight of a grouped convolution lists the channels of one group only.
        return [self._grouped.get(int(ids[0]), ids) for ids in found]

    def _all_spans(self, part: Part) -> list[Span]:
        return [span for name in part.tensors for span in self.spans[name]]

    def _sizes(self, part: Part) -> list[list[int]]:
        return [self._sizes_of(name) for name in part.tensors]

    def _sizes_of(self, name: str) -> list[int]:
        return [span.size for span in self.spans[name]]


def _moved(items: Sequence[C], source: str, to: str) -> Iterator[C]:
    """What code inside one module says of its sizes, said of another."""
    for item in items:
        stack = item.site.stack
        if stack and _within(stack[0], source):
            moved = tuple(to + path.removeprefix(source) if _within(path, source) else path for path in stack)
            yield replace(item, site=replace(item.site, stack=moved))


def _same_settings(one: nn.Module, other: nn.Module) -> bool:
    plain = (
        {
            name: value
            for name, value in vars(module).items()
            if name not in NO_MATTER and not name.startswith("_") and isinstance(value, (bool, int, float, str, tuple))
        }
        for module in (one, other)
    )
    return type(one) is type(other) and next(plain) == next(plain)


def _input_size(module: nn.Module | None) -> int | None:
    """How many channels the first convolution or linear layer inside reads."""
    for inner in module.modules() if module is not None else ():
        dim = input_dim(inner)
        if dim is not None:
            size = int(inner.weight.shape[dim])  # type: ignore[index]
            return size * inner.groups if isinstance(inner, _ConvNd) and not inner.transposed else size
    return None


def _within(path: str, outer: str) -> bool:
    return path == outer or path.startswith(f"{outer}.")


def note_of(unreached: Sequence[Unreached]) -> str:
    """What became of unreached parts, in a sentence."""
    kept = [one.path for one in unreached if one.twin is None]
    along = [f"{one.path} (as {one.twin})" for one in unreached if one.twin is not None]
    said = [f"of {shortened(kept)}, so channels of its siblings that it may read or make stay"] if kept else []
    said += [f"of {shortened(along)}, which lose channels along with a sibling that is built alike"] if along else []
    return f"no trace has reached the parameters {'; '.join(said)}"


def warn_of_unreached(unreached: Sequence[Unreached], untraced: Sequence[str] = ()) -> None:
    """Say before anything is removed what may meet it unseen, and what to do; at the line of the user's code."""
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("lightning_prune", "contextlib"):
        frame, level = frame.f_back, level + 1
    if unreached:
        warnings.warn(
            f"{note_of(unreached)}. If it runs somewhere, trace that too: also=[...] takes inputs that reach it, or "
            "functions that call it. If it never does, remove it from the model (put an Identity or None in its place)",
            UnreachedWarning,
            stacklevel=level,
        )
    if untraced:
        warnings.warn(
            f"{'; '.join(untraced)}. Channels that only the rest of it needs may go. Let it run on a copy of the "
            "module before training, on the first batch, or trace what it calls: also=[...]",
            UnreachedWarning,
            stacklevel=level,
        )
