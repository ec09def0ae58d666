"""What a traced model is made of, as people speak of it: layers, groups of channels, slices of tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from lightning_prune.errors import PlanError


@dataclass(frozen=True, eq=False)
class Slice:
    """Where the channels of a group lie in one tensor.

    Attributes:
        tensor: qualified name of a parameter or buffer.
        dim: the dimension that loses entries.
        index: (channels, k) entries of ``dim`` that belong to each channel; k > 1 behind a flatten, in grouped
            convolutions and where a tensor is read several times.
        masked: these entries are zero in the masked model (readers and buffers usually are not).
        layer: the member layer they belong to (a filter, its bias, its batch norm), None if to the whole group.
        norm: they belong to a batch norm.
    """

    tensor: str
    dim: int
    index: Tensor
    masked: bool
    layer: str | None
    norm: bool = False


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution or linear layer whose filters are channels of a group.

    Attributes:
        name: module path.
        weight: qualified parameter name.
        dim: its output dimension (0; 1 in transposed convolutions).
        filters: how many filters it has.
        index: (channels, k) filters that belong to each channel of the group.
        norm: module path of the batch norm of this layer's output, if any.
        reader: module path of the first layer that reads these channels, if any.
        reader_index: (channels, r) its input entries that each channel feeds.
    """

    name: str
    weight: str
    dim: int
    filters: int
    index: Tensor
    norm: str | None = None
    reader: str | None = None
    reader_index: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Group:
    """Channels of several layers that must keep or lose the same index together.

    Attributes:
        name: the first of its layers.
        size: number of channels.
        layers: the member layers, in the order they run.
        slices: every tensor entry that goes when a channel goes.
        prunable: whether channels can be removed without loss.
        reason: if not, why.
    """

    name: str
    size: int
    layers: tuple[Layer, ...]
    slices: tuple[Slice, ...]
    reason: str | None = None

    @property
    def prunable(self) -> bool:
        """Whether channels can be removed without loss."""
        return self.reason is None

    def layer(self, name: str) -> Layer:
        """A member by its module path."""
        return next(layer for layer in self.layers if layer.name == name)


@dataclass(frozen=True, eq=False)
class ChannelGraph:
    """All channel groups of a model, from `lightning_prune.trace`.

    Attributes:
        groups: in the order the model runs; those that cannot be pruned carry the reason.
        shapes: shape of every parameter and buffer, so that a graph is never used on another model.
        notes: what the trace could not see or follow (operators without a rule, unused parameters).
    """

    groups: tuple[Group, ...]
    shapes: dict[str, tuple[int, ...]]
    notes: tuple[str, ...] = ()
    _by_name: dict[str, Group] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {group.name: group for group in self.groups})

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

    def describe(self) -> str:
        """A table of the groups for people: name, channels, layers, prunable or why not."""
        rows = [("group", "channels", "layers", "prunable")]
        for group in self.groups:
            names = ", ".join(layer.name for layer in group.layers)
            rows.append((group.name, str(group.size), names, "yes" if group.prunable else f"no: {group.reason}"))
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        lines = [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[3]}\n    {row[2]}" for row in rows[1:]]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])
