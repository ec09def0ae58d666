"""The channel graph: all groups of a traced model, and what a removal of channels means for its tensors and sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_prune.errors import PlanError
from lightning_prune.graph.describe import describe, totals
from lightning_prune.graph.groups import Group, Layer
from lightning_prune.graph.means import Form
from lightning_prune.graph.model_checks import check_eager
from lightning_prune.graph.unreached import Unreached, warn_of_unreached
from lightning_prune.model_state.code_sizes import SIZES
from lightning_prune.model_state.cutting import Cut, MeanRescaling, NewSize


@dataclass(frozen=True, eq=False)
class SizeAttribute:
    """An integer attribute of a module that says how many of certain channels there are."""

    module: str
    attribute: str
    position: int | str | None  # the item, if the attribute is a list or tuple, or the key of a size in the code
    sources: dict[str, Tensor] = field(repr=False)  # per group, channels that count 1 each (or several times)
    fixed: int  # what never goes

    def without(self, removed: Mapping[str, Tensor]) -> NewSize:
        """The number once these channels ({group: indices}) are gone."""
        gone = (torch.isin(channels, removed.get(group, channels[:0])) for group, channels in self.sources.items())
        value = self.fixed + sum(int((~entries).sum()) for entries in gone)
        return NewSize(self.module, self.attribute, self.position, value)


@dataclass(frozen=True, eq=False)
class RescaledMean:
    """A mean over channels that are zero when masked: an eps and a weight of its module make up for fewer of them."""

    counted: SizeAttribute  # over how many it is
    form: Form

    def without(self, removed: Mapping[str, Tensor]) -> MeanRescaling | None:
        """What changes once these channels ({group: indices}) are gone."""
        before, after = (self.counted.without(gone).value for gone in ({}, removed))
        if before == after or self.form.weight is None:
            return None
        path, (eps_factor, factor) = self.counted.module, self.form.factors(before, after)
        weight = f"{path}.{self.form.weight}" if path else self.form.weight
        return MeanRescaling(path, self.form.eps, eps_factor, weight, factor, self.form.offset)


@dataclass(frozen=True, eq=False)
class ChannelGraph:
    """All channel groups of a model, from `lightning_prune.trace`.

    Attributes:
        groups: in the order the model runs; those that cannot be pruned carry the reason.
        shapes: shape of every parameter and buffer, so that a graph is never used on another model.
        notes: what the trace could not see or follow (operators without a rule, unused parameters).
        sizes: integer attributes of modules that change with the channels.
        unreached: modules and parameters that no trace has used.
        untraced: the user's own steps of which not everything ran while tracing, and why.
        means: means over channels that stay exact, since their module's eps and weight change with the channels.

    Example:
        >>> import torch, lightning_prune as lp
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1))
        >>> graph = lp.trace(model, torch.zeros(1, 3, 8, 8))
        >>> [group.name for group in graph.prunable_groups], graph.group("2").reason
        (['0'], "reaches the model's output")
    """

    groups: tuple[Group, ...]
    shapes: dict[str, tuple[int, ...]]
    notes: tuple[str, ...] = ()
    sizes: tuple[SizeAttribute, ...] = ()
    unreached: tuple[Unreached, ...] = ()
    untraced: tuple[str, ...] = ()
    means: tuple[RescaledMean, ...] = ()
    _by_name: dict[str, Group] = field(init=False, repr=False)
    _told: list[bool] = field(init=False, repr=False, default_factory=list)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {group.name: group for group in self.groups})

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {totals(self.groups)} print(graph) lists them.>"

    def __str__(self) -> str:
        return self.describe()

    @property
    def prunable_groups(self) -> tuple[Group, ...]:
        """Those that can lose channels."""
        return tuple(group for group in self.groups if group.prunable)

    @property
    def layers(self) -> dict[str, Layer]:
        """Member layers of all prunable groups by name."""
        return {layer.name: layer for group in self.prunable_groups for layer in group.layers}

    def group(self, name: str) -> Group:
        """A group by its name.

        Raises:
            PlanError: there is none of that name.
        """
        if name not in self._by_name:
            raise PlanError(f"the model has no channel group {name!r}; its groups are {', '.join(self._by_name)}")
        return self._by_name[name]

    def check(self, model: nn.Module) -> None:
        """Refuse a model that is not the traced one.

        Raises:
            PlanError: names or shapes differ, or it is scripted.
        """
        check_eager(model)
        shapes = {name: tuple(tensor.shape) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        for name, shape in self.shapes.items():
            if name not in shapes:
                raise PlanError(f"the graph was traced on another model: this one has no tensor {name!r}")
            if shapes[name] != shape:
                raise PlanError(
                    f"the graph was traced on another model: {name!r} is {list(shapes[name])} here and was "
                    f"{list(shape)}; trace the model again"
                )

    def warn_of_unreached(self) -> None:
        """Warn once, before channels go, of code that no trace has reached; see `UnreachedWarning`."""
        if not self._told:
            self._told.append(True)
            warn_of_unreached(self.unreached, self.untraced)

    def warns_with(self, earlier: ChannelGraph) -> None:
        """Count what was said of an earlier graph of the same model as said."""
        object.__setattr__(self, "_told", earlier._told)

    def cuts(self, removed: Mapping[str, Tensor]) -> list[Cut]:
        """What survives of every tensor dimension when these channels ({group: indices}) go."""
        gone: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = {}
        for name, channels in removed.items():
            if len(channels):
                for part in self.group(name).slices:
                    gone.setdefault((part.tensor, part.dim), []).append((part.index, channels))
        kept: dict[tuple[int, ...], Tensor] = {}  # most slices of a group share one index
        cuts = []
        for (tensor, dim), entries in gone.items():
            size = self.shapes[tensor][dim]
            key = (size, *(id(part) for pair in entries for part in pair))
            if key not in kept:
                keep = torch.ones(size, dtype=torch.bool)
                for index, channels in entries:
                    keep[index[channels].flatten()] = False
                kept[key] = keep.nonzero().flatten()
            if not len(kept[key]):
                raise PlanError(f"the plan leaves nothing of {tensor!r} along dimension {dim}; keep more channels")
            cuts.append(Cut(tensor, dim, kept[key]))
        return cuts

    def new_sizes(self, removed: Mapping[str, Tensor]) -> list[NewSize]:
        """Integer attributes that change when these channels go."""
        anything = any(len(channels) for channels in removed.values())
        return [size.without(removed) for size in self.sizes if anything or size.attribute != SIZES]

    def mean_rescalings(self, removed: Mapping[str, Tensor]) -> list[MeanRescaling]:
        """What makes up for means that count fewer when these channels go."""
        return [found for mean in self.means if (found := mean.without(removed)) is not None]

    def describe(self) -> str:
        """A table of the groups, with the totals and the notes of the trace below.

        "parameters" are all that have an entry in the group: the filters of its layers, their biases and batch norms,
        and what other layers read these channels with. Removing one channel removes "per channel" of them. A weight
        between two groups counts in both.

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
        return describe(self.groups, self.shapes, self.notes)
