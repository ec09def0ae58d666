"""What a latency table says of a plan: milliseconds of the layers that it leaves, without building them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from lightning_prune.errors import PlanError, PruningError
from lightning_prune.graph import ChannelGraph, Group
from lightning_prune.graph.groups import Slice
from lightning_prune.measure.latency_table import LatencyTable
from lightning_prune.measure.layer_calls import LayerCall, LayerKind, layer_calls
from lightning_prune.plan import Plan

Count = int | NDArray[np.int64]
SHOWN = 5  # layers that a message names


@dataclass(frozen=True)
class Width:
    """Channels on one side of a layer.

    Attributes:
        dense: how many there are before pruning.
        parts: {group: (channels that go with one of the group's, channels of the group)}.
    """

    dense: int
    parts: Mapping[str, tuple[int, int]]

    def of(self, kept: Mapping[str, Any]) -> Any:
        """How many there are if groups keep so many channels; integers, or arrays that broadcast."""
        removed = (times * (size - kept[name]) for name, (times, size) in self.parts.items() if name in kept)
        return self.dense - sum(removed)


@dataclass(frozen=True)
class TimedLayer:
    """One kind of use of one weight.

    Attributes:
        weight: qualified name of the parameter.
        kind: what its time depends on besides its channels.
        into, out: its channels.
        whole_groups: of a grouped convolution whole groups go, each with the time it takes in the dense model.
        uses: how often it runs so in a forward pass.
        table: of its time.
    """

    weight: str
    kind: LayerKind
    into: Width
    out: Width
    whole_groups: bool
    uses: int
    table: LatencyTable

    def time(self, channels_in: Count, channels_out: Count) -> NDArray[np.float64]:
        """Milliseconds in a forward pass, at so many channels."""
        if self.whole_groups:
            dense = self.table.time(self.kind, self.into.dense, self.out.dense)
            return np.asarray(self.uses * dense * np.asarray(channels_out) / self.out.dense)
        return np.asarray(self.uses * self.table.time(self.kind, channels_in, channels_out))

    def at(self, kept: Mapping[str, Any]) -> NDArray[np.float64]:
        """Milliseconds if groups keep so many channels."""
        return self.time(self.into.of(kept), self.out.of(kept))


class TimeModel:
    """Time of the layers of the reconstructed model of any plan, by a latency table.

    It is the sum over the convolutions and linear layers of one forward pass. What lies between them (additions,
    pooling, the engine's own work) is not in it, so it orders plans; `lightning_prune.measure` has the last word.
    A grouped convolution that loses whole groups takes their share of its dense time.

    Args:
        model: the traced model; left as it is.
        graph: its channel graph.
        example_inputs: as for `lightning_prune.trace`; the table must be of layers at these sizes.
        table: of these layers.

    Attributes:
        layers: what is summed.
        dense: milliseconds of the dense model.

    Raises:
        PlanError: the graph belongs to another model, or the table lacks layers of this one.
        TraceError: the model does not run on the inputs.
        PruningError: a layer's weight is computed from other tensors at every call.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, example_inputs: Any, table: LatencyTable) -> None:
        graph.check(model)
        calls = Counter(layer_calls(model, example_inputs))
        slices: dict[tuple[str, int], list[tuple[Group, Slice]]] = {}
        for group in graph.groups:
            for part in group.slices:
                slices.setdefault((part.tensor, part.dim), []).append((group, part))
        self.layers = [
            TimedLayer(call.weight, call.kind, *_sides(call, slices), uses, table) for call, uses in calls.items()
        ]
        missing = []
        for layer in self.layers:
            try:
                layer.at({})
            except PruningError:
                missing.append(layer.weight)
        if missing:
            more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
            raise PlanError(
                f"the latency table has no times of {', '.join(missing[:SHOWN])}{more}, as this model runs them on "
                "these inputs: make one of this model at this size and batch, with lightning-prune latency-table"
            )
        self.dense = self.at({})

    def at(self, kept: Mapping[str, int]) -> float:
        """Milliseconds if groups keep so many channels; those that are not named keep all."""
        return float(sum(layer.at(kept) for layer in self.layers))

    def of(self, plan: Plan) -> float:
        """Milliseconds of the reconstructed model."""
        return self.at({name: len(group.keep) for name, group in plan.groups.items()})


def _sides(call: LayerCall, slices: Mapping[tuple[str, int], list[tuple[Group, Slice]]]) -> tuple[Width, Width, bool]:
    """Channels in and out, by the first two dimensions of the weight, and whether whole groups of a convolution go."""
    of_first, of_second = (slices.get((call.weight, dim), []) for dim in (0, 1))
    transposed = call.kind.operator == "conv_transpose"
    first, second = call.channels if transposed else call.channels[::-1]
    groups = call.kind.groups or call.channels[0]
    whole = groups > 1 and any(_takes_whole(part, first // groups) for _, part in of_first)
    along_first = Width(first, _parts(of_first))
    if whole:  # the other side follows
        along_second = Width(second, {k: (n * second // first, size) for k, (n, size) in along_first.parts.items()})
    else:  # of a grouped convolution this dimension has the channels of one group
        along_second = Width(second, {k: (n * groups, size) for k, (n, size) in _parts(of_second).items()})
    sides = (along_first, along_second) if transposed else (along_second, along_first)
    return (*sides, whole and call.kind.groups > 0)


def _parts(slices: list[tuple[Group, Slice]]) -> dict[str, tuple[int, int]]:
    parts: dict[str, tuple[int, int]] = {}
    for group, part in slices:
        times, size = parts.get(group.name, (0, group.size))
        parts[group.name] = (times + part.index.shape[1], size)
    return parts


def _takes_whole(part: Slice, per_group: int) -> bool:
    """Whether a channel is all filters of some groups of a convolution, not one filter of each."""
    filters = part.index[0]
    return len(filters) == per_group * len((filters // per_group).unique())
