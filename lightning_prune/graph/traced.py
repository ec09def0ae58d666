"""What the runs of a model have told, and the graphs that are drawn up of it under the decisions of `rehearse`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_prune.graph import computed_weights, sizes
from lightning_prune.graph.build_groups import Classes, build_groups
from lightning_prune.graph.channel_graph import ChannelGraph, RescaledMean, SizeAttribute
from lightning_prune.graph.constraints import Split
from lightning_prune.graph.describe import shortened
from lightning_prune.graph.groups import Group
from lightning_prune.graph.label_space import Freeze, LabelSpace
from lightning_prune.graph.rehearse import Decisions, Proposal, places_of
from lightning_prune.graph.rescaled_means import Rescaled
from lightning_prune.graph.resolve import Choice, Resolved, resolve
from lightning_prune.graph.unreached import Unreached, note_of
from lightning_prune.graph.widths import Widths
from lightning_prune.model_state.code_sizes import SIZES


@dataclass(eq=False)
class Traced:
    """All that was recorded."""

    model: nn.Module
    space: LabelSpace
    widths: Widths
    shapes: dict[str, tuple[int, ...]]
    deployed: set[str]  # tensors that forward uses
    notes: tuple[str, ...]
    computed: Any
    unreached: tuple[Unreached, ...]
    untraced: tuple[str, ...]
    rescaled: Sequence[Rescaled]
    statistics: bool
    _last: tuple[Any, Proposal] | None = field(init=False, default=None)

    def propose(self, decisions: Decisions) -> Proposal:
        """The graph under given decisions."""
        widths, pairs = self.widths.followed(decisions.choices)
        modules = dict(self.model.named_modules())
        resolved = resolve(self.space, decisions.choices, decisions.sized, pairs, decisions.left, decisions.counted)
        shared = [size for size in resolved.sizes if decisions.choices.get(size.site.kind) is Choice.WIDTHS]
        if together := sizes.counted_together(modules, shared):
            pairs = [*pairs, *together]
            resolved = resolve(self.space, decisions.choices, decisions.sized, pairs, decisions.left, decisions.counted)
        found = sizes.match(modules, [*self.space.sizes, *resolved.sizes, *widths])
        uncounted = sizes.match_splits(modules, resolved.splits, found)
        outcome = (resolved.axes, list(found), len(pairs), list(decisions.held), set(decisions.held_whole))
        if self._last is not None and self._last[0] == outcome:
            return self._last[1]
        frozen = [*self._held(decisions), *resolved.frozen, *uncounted, *self._beside_forward(resolved)]
        classes = Classes(self.space, resolved.joint, frozen, allow_statistics=self.statistics)
        groups = build_groups(classes)
        free = {group.name: channels for group, channels in groups.items() if group.prunable}
        attributes = tuple(sizes.attributes(found, resolved.joint, free))
        counted = sizes.attributes({(r.module, "", None): [r.ids] for r in self.rescaled}, resolved.joint, free)
        how = {one.module: one.form for one in self.rescaled}
        means = tuple(RescaledMean(one, how[one.module]) for one in counted)
        notes = self._notes(tuple(groups), attributes)
        graph = ChannelGraph(tuple(groups), self.shapes, notes, attributes, self.unreached, self.untraced, means)
        places, guessed = places_of(classes, decisions.choices)
        places |= {size.site.stack[0]: size.site.kind for size in widths}
        guessed |= {size.site.kind for size in widths}

        def unread() -> tuple[SizeAttribute, ...]:
            splits = [constraint for constraint in self.space.constraints if isinstance(constraint, Split)]
            more = sizes.unread(modules, splits, found)
            return tuple(sizes.attributes(more, resolved.joint, free))

        self._last = outcome, Proposal(graph, places, guessed, self.widths.kinds, unread, uneven=bool(resolved.splits))
        return self._last[1]

    def _held(self, decisions: Decisions) -> list[Freeze]:
        """What modules read (and make) that fail with fewer channels."""
        readers = self.space.marked("reader")
        return [
            Freeze(
                span.ids if path in decisions.held_whole else span.ids[readers[span.ids]],
                reason,
                withheld=path in decisions.sized,
            )
            for path, reason in decisions.held.items()
            for span in self.space.spans
            if not path or span.tensor.startswith(f"{path}.")
        ]

    def _notes(self, groups: tuple[Group, ...], attributes: Sequence[SizeAttribute]) -> tuple[str, ...]:
        """What the user is told beside the groups."""
        notes = [*self.notes, *computed_weights.notes(self.model, groups, self.computed)]
        if replaced := dict.fromkeys(one.module for one in attributes if one.attribute == SIZES and one.sources):
            names = shortened([repr(path) for path in replaced])
            notes.append(f"the smaller model reads sizes that stand in the code of {names} from an attribute")
        return (*notes, *([note_of(self.unreached)] if self.unreached else []))

    def _beside_forward(self, resolved: Resolved) -> list[Freeze]:
        """Filters of layers that forward never runs (auxiliary heads, teachers): cutting them makes nothing cheaper.

        Unless they go together with filters that it does run.
        """
        filters = self.space.marked("filter")
        some, _ = self.space.any_and_all(filters)
        made = [span for span, any_filter in zip(self.space.spans, some, strict=True) if any_filter]
        if all(span.tensor in self.deployed for span in made):
            return []
        mine, others = (
            [span.ids[filters[span.ids]] for span in made if (span.tensor in self.deployed) is deployed]
            for deployed in (True, False)
        )
        ids = torch.cat(others)
        alone = ids[~torch.isin(resolved.joint[ids], resolved.joint[torch.cat([*mine, ids[:0]])])]
        return [Freeze(alone, "makes channels that forward never reads")]
