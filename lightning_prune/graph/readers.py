"""Readers: the convolutions and linear layers that take the channels of a group in."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_prune.graph.groups import Group


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer, by its path, whose output is a sum over what the channels of a group put into it."""

    path: str
    dim: int  # its weight's input dimension (1; 0 in transposed convolutions)
    index: Tensor  # (channels, r) entries of that dimension that belong to each channel

    @property
    def weight(self) -> str:
        """Qualified name of its weight."""
        return f"{self.path}.weight" if self.path else "weight"


def readers_of(model: nn.Module, group: Group) -> dict[str, Reader]:
    """Convolutions and linear layers that read the channels of a group, by module path.

    Not depthwise convolutions, which belong to the channel, nor weights computed from other parameters (weight norm).
    """
    found = {}
    for part in group.slices:
        path, _, attribute = part.tensor.rpartition(".")
        if part.layer is None and attribute == "weight" and input_dim(model.get_submodule(path)) == part.dim:
            found[path] = Reader(path, part.dim, part.index)
    return found


def input_dim(module: nn.Module) -> int | None:
    """The dimension of a layer's weight along which its input channels lie; None if it is no such layer."""
    if isinstance(module, _ConvTransposeNd):
        return 0
    return 1 if isinstance(module, _ConvNd | nn.Linear) else None
