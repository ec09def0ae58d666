"""Readers: the convolutions and linear layers that take the channels of a group in."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_prune.graph.groups import Group


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer whose output is a sum over what the channels of a group put into it.

    Attributes:
        path: of the module.
        dim: its weight's input dimension (1; 0 in transposed convolutions).
        index: (channels, r) entries of that dimension that belong to each channel.
    """

    path: str
    dim: int
    index: Tensor

    @property
    def weight(self) -> str:
        """Qualified name of its weight."""
        return f"{self.path}.weight" if self.path else "weight"


def readers_of(model: nn.Module, group: Group) -> dict[str, Reader]:
    """Convolutions and linear layers that read the channels of a group, by module path.

    Depthwise convolutions belong to the channel instead; whatever computes its weight from other parameters (weight
    norm) is left out.
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
