"""Readers: the convolutions and linear layers that take the channels of a group in."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_prune.graph.computed_weights import follows_elementwise, owner, source_of
from lightning_prune.graph.groups import Group


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer, by its path, whose output is a sum over what the channels of a group put into it."""

    path: str
    weight: str  # qualified name of the parameter that holds its weight
    dim: int  # its weight's input dimension (1; 0 in transposed convolutions)
    index: Tensor  # (channels, r) entries of that dimension that belong to each channel


def readers_of(model: nn.Module, group: Group) -> dict[str, Reader]:
    """Convolutions and linear layers that read the channels of a group, by module path.

    Not depthwise convolutions, which belong to the channel, nor weights computed from other parameters (weight norm)
    but for masks of `torch.nn.utils.prune`, nor recurrent layers.
    """
    found = {}
    for part in group.slices:
        path = owner(part.tensor)
        if part.layer is None and input_dim(model.get_submodule(path)) == part.dim and _is_weight(model, part.tensor):
            found[path] = Reader(path, part.tensor, part.dim, part.index)
    return found


def other_reader(model: nn.Module, group: Group) -> str | None:
    """A reader of a group that `readers_of` leaves out, by its tensor and what it is; None if there is none."""
    for part in group.slices:
        module = model.get_submodule(owner(part.tensor))
        name = part.tensor.rpartition(".")[2]
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            return f"{part.tensor}: a recurrent layer"
        computed = source_of(part.tensor) is not None and not follows_elementwise(model, part.tensor)
        if part.layer is None and computed and input_dim(module) == part.dim and not name.endswith("_mask"):
            return f"{part.tensor}: a layer whose weight is computed from other parameters"
    return None


def _is_weight(model: nn.Module, tensor: str) -> bool:
    name = tensor.rpartition(".")[2]
    return name == "weight" or (source_of(tensor) == "weight" and follows_elementwise(model, tensor))


def input_dim(module: nn.Module) -> int | None:
    """The dimension of a layer's weight along which its input channels lie; None if it is no such layer."""
    if isinstance(module, _ConvTransposeNd):
        return 0
    return 1 if isinstance(module, _ConvNd | nn.Linear) else None
