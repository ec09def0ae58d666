"""What a group of channels is made of: layers, slices of tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


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
    index: Tensor = field(repr=False)
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
    index: Tensor = field(repr=False)
    norm: str | None = None
    reader: str | None = None
    reader_index: Tensor | None = field(default=None, repr=False)


@dataclass(frozen=True, eq=False)
class Group:
    """Channels of several layers that must keep or lose the same index together.

    Attributes:
        name: the first of its layers.
        size: number of channels.
        layers: the member layers, in the order they run.
        slices: every tensor entry that goes when a channel goes.
        prunable: whether channels can be removed.
        reason: if not, why.
        statistics: the statistic over channels (layer norm, softmax) that changes when some go. It is the reason
            unless `lightning_prune.trace` was told to allow it; then the group is prunable, but not without loss.
        withheld: the reason is that the channels might be needed by code or at sizes that were not traced.
    """

    name: str
    size: int
    layers: tuple[Layer, ...]
    slices: tuple[Slice, ...] = field(repr=False)
    reason: str | None = None
    statistics: str | None = None
    withheld: bool = False

    @property
    def prunable(self) -> bool:
        """Whether channels can be removed: without loss, unless `statistics` says otherwise."""
        return self.reason is None

    @property
    def verdict(self) -> str:
        """Whether it is prunable, and why not: ``yes``, ``yes, but with loss: ...`` or ``no: ...``."""
        if self.reason is not None:
            return f"no: {self.reason}"
        return "yes" if self.statistics is None else f"yes, but with loss: {self.statistics}"

    def layer(self, name: str) -> Layer:
        """A member by its module path."""
        return next(layer for layer in self.layers if layer.name == name)
