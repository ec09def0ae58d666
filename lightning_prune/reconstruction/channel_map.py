"""Old and new channels: which number every channel of the dense model has in the smaller one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_prune.errors import CheckpointError, PlanError
from lightning_prune.graph import ChannelGraph
from lightning_prune.graph.computed_weights import owner, source_of
from lightning_prune.graph.describe import aligned, ranges
from lightning_prune.model_state.cut_history import History, Kept, history_of
from lightning_prune.model_state.recomputing import value_of
from lightning_prune.plan import Plan
from lightning_prune.reconstruction.small_model import cuts

WIDTH = 80  # characters of a terminal, which a table fills with the numbers that stay


@dataclass(frozen=True)
class OldChannels:
    """Channels on one side of a layer.

    Attributes:
        size: how many the dense layer has.
        keep: the old numbers of those that are left, in their new order.

    Example:
        >>> outputs = OldChannels(4, (0, 3))
        >>> outputs.new, outputs.removed
        ({0: 0, 3: 1}, (1, 2))
    """

    size: int
    keep: tuple[int, ...]

    @property
    def new(self) -> dict[int, int]:
        """{old number: new number} of those that are left."""
        return {old: new for new, old in enumerate(self.keep)}

    @property
    def removed(self) -> tuple[int, ...]:
        """Old numbers of those that are gone."""
        return tuple(sorted(set(range(self.size)) - set(self.keep)))

    def __str__(self) -> str:
        left = len(self.keep)
        return f"{self.size:,}" if left == self.size else f"{self.size:,} → {left:,}"


@dataclass(frozen=True)
class LayerChannels:
    """Both sides of a convolution or linear layer."""

    outputs: OldChannels
    inputs: OldChannels

    @property
    def changed(self) -> bool:
        """Whether any channel is gone."""
        return any(len(side.keep) < side.size for side in (self.outputs, self.inputs))


@dataclass(frozen=True)
class ChannelMap:
    """From the channels of a dense model to those of the smaller one; ``str`` tabulates it.

    Attributes:
        layers: every convolution and linear layer by its module path. Inputs of a linear layer behind a flatten are
            the flattened ones, several per channel.
        tensors: {parameter or buffer: {dimension: its entries}}, of all dimensions that lose some: norms, biases and
            parameters of other modules, too.

    Example:
        >>> import lightning_prune as lp
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
        >>> graph = lp.trace(model, torch.zeros(1, 1, 4, 4))
        >>> plan = lp.LayerRatio(0.5).select(graph, {"0": torch.tensor([4.0, 1.0, 2.0, 3.0])})
        >>> channels = ChannelMap.planned(model, graph, plan)
        >>> print(channels)
        layer  outputs  inputs  old outputs that stay
        -----  -------  ------  ---------------------
        0        4 → 2       1  0, 3
        3            2  16 → 8  all
        >>> channels.layers["3"].inputs.new
        {0: 0, 1: 1, 2: 2, 3: 3, 12: 4, 13: 5, 14: 6, 15: 7}
        >>> ChannelMap.of(lp.reconstruct(model, graph, plan)) == channels
        True
    """

    layers: dict[str, LayerChannels]
    tensors: dict[str, dict[int, OldChannels]]

    @classmethod
    def planned(cls, model: nn.Module, graph: ChannelGraph, plan: Plan) -> ChannelMap:
        """What `lightning_prune.reconstruct` would do; of a model that was cut before, from its dense channels on.

        Args:
            model: the traced model, masked or not.
            graph: from `lightning_prune.trace`.
            plan: in the channels of this model.

        Raises:
            PlanError: the plan or the graph does not belong to this model, or it was cut and nobody noted how.
        """
        plan.check(graph)
        graph.check(model)
        return _map(model, _known(model).after(cuts(graph, plan), graph.shapes))

    @classmethod
    def of(cls, small: nn.Module) -> ChannelMap:
        """That of a model from `lightning_prune.reconstruct`, or `lightning_prune.load`; a dense one keeps all.

        Raises:
            PlanError: it was cut, and nobody noted how (a file of an early version).
        """
        return _map(small, _known(small))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ChannelMap:
        """Read it from a pruned file (`lightning_prune.save`, or a Lightning checkpoint); no model is needed.

        Raises:
            CheckpointError: no such file, or it is of a dense or masked model, whose channels have the old numbers.
        """
        from lightning_prune.reconstruction.checkpoint import read

        data = read(path).get("channels")
        if not isinstance(data, Mapping) or not data.get("tensors"):
            raise CheckpointError(
                f"{path} holds no map of channels: its model is dense or masked, so that all have their old numbers, "
                "or an early version wrote it"
            )
        return cls.from_dict(data, str(path))

    def cut(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take the same entries out of tensors of the dense model: other weights, masks, averages, momentum.

        What the removed channels contributed is lost: it is what `lightning_prune.reconstruct` does with weights.

        Args:
            tensors: by the names of parameters and buffers, dense in shape; other names are handed on.

        Raises:
            PlanError: a tensor of another shape.

        Example:
            >>> tensors = {"fc.bias": {0: OldChannels(3, (0, 2))}}
            >>> ChannelMap({}, tensors).cut({"fc.bias": torch.tensor([5.0, 6.0, 7.0])})
            {'fc.bias': tensor([5., 7.])}
        """
        found = dict(tensors)
        for name, dims in self.tensors.items():
            for dim, entries in dims.items() if name in found else ():
                value = found[name]
                if dim >= value.dim() or value.shape[dim] != entries.size:
                    raise PlanError(
                        f"{name!r} has shape {list(value.shape)}, and the dense one has {entries.size} entries along "
                        f"dimension {dim}"
                    )
                found[name] = value = value.index_select(dim, torch.tensor(entries.keep, device=value.device))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionaries, tuples and integers, fit for JSON."""
        return {
            "layers": {
                path: {"outputs": vars(layer.outputs), "inputs": vars(layer.inputs)}
                for path, layer in self.layers.items()
            },
            "tensors": {
                name: {str(dim): vars(side) for dim, side in dims.items()} for name, dims in self.tensors.items()
            },
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "this") -> ChannelMap:
        """Read what `to_dict` wrote.

        Raises:
            CheckpointError: it is something else.
        """
        try:
            return cls(
                {str(k): LayerChannels(_side(v["outputs"]), _side(v["inputs"])) for k, v in data["layers"].items()},
                {str(k): {int(dim): _side(side) for dim, side in v.items()} for k, v in data["tensors"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{source} holds no map of channels: {error!r}") from error

    def __str__(self) -> str:
        changed = {path: layer for path, layer in self.layers.items() if layer.changed}
        if not changed:
            return "all channels have their old numbers"
        head = ("layer", "outputs", "inputs", "old outputs that stay")
        sides = [(path, str(layer.outputs), str(layer.inputs)) for path, layer in changed.items()]
        taken = sum(2 + max(map(len, column)) for column in zip(head, *sides, strict=False))
        room = max(len(head[-1]), WIDTH - taken)
        kept = [layer.outputs.keep if layer.outputs.removed else None for layer in changed.values()]
        lists = ["all" if keep is None else ranges(keep, room) for keep in kept]
        rows = [(*row, text) for row, text in zip(sides, lists, strict=True)]
        return "\n".join(aligned(head, rows))


def noted(small: nn.Module) -> dict[str, Any] | None:
    """What a file keeps of a model's map, plain data; None if nobody noted how it was cut."""
    history = history_of(small)
    return None if history is None else {**_map(small, history).to_dict(), "groups": dict(history.groups)}


def history_in(data: Any, state: Mapping[str, Any], source: str) -> History | None:
    """From what `noted` returned, how the model of these tensors was cut; None for files that do not say it.

    Raises:
        CheckpointError: it is damaged, or not that of the tensors beside it.
    """
    if data is None:
        return None
    tensors = ChannelMap.from_dict(data, source).tensors
    for name, dims in tensors.items():
        for dim, side in dims.items():
            shape = getattr(state.get(name), "shape", ())
            if dim >= len(shape) or shape[dim] != len(side.keep):
                raise CheckpointError(
                    f"{source} is damaged: {name!r} is {list(shape)}, and its map keeps {len(side.keep)} entries of "
                    f"dimension {dim}"
                )
    kept = {name: {dim: Kept(side.size, side.keep) for dim, side in dims.items()} for name, dims in tensors.items()}
    groups = data.get("groups", {})
    if not isinstance(groups, Mapping) or not all(type(count) is int and count > 0 for count in groups.values()):
        raise CheckpointError(f"{source} is damaged: {groups!r} are no groups of convolutions")
    return History(kept, {str(path): count for path, count in groups.items()})


def _known(model: nn.Module) -> History:
    history = history_of(model)
    if history is None:
        raise PlanError(
            "nobody noted how this model was cut (an early version wrote its file): prune the dense model with its "
            "plan again, or ask for ChannelMap.planned(dense_model, graph, plan)"
        )
    return history


def _map(model: nn.Module, history: History) -> ChannelMap:
    names = {id(parameter): name for name, parameter in model.named_parameters()}  # the first, where it is shared
    layers = {}
    for path, module in model.named_modules():
        if isinstance(module, (_ConvNd, nn.Linear)) and (weight := _weight(module, path)) is not None:
            sides = [_all(size) for size in module.get_parameter(weight).shape]
            for dim, kept in history.kept.get(names[id(module.get_parameter(weight))], {}).items():
                sides[dim] = OldChannels(*kept)
            layers[path] = _layer(module, sides[:2], history.groups.get(path, 1))
    found = {name: {dim: OldChannels(*kept) for dim, kept in dims.items()} for name, dims in history.kept.items()}
    return ChannelMap(layers, found)


def _weight(module: nn.Module, path: str) -> str | None:
    """Name, within the layer, of the parameter that a layer's weight is, or is computed from."""
    value = value_of(module, "weight")
    for name, parameter in module.named_parameters():
        full = f"{path}.{name}" if path else name
        source = name if name == "weight" else source_of(full) if owner(full) == path else None
        if source == "weight" and isinstance(value, Tensor) and parameter.shape == value.shape:
            return name
    return None


def _layer(module: nn.Module, sides: Sequence[OldChannels], groups: int) -> LayerChannels:
    """From the first two dimensions of a weight, of which one counts within each of the convolution's groups."""
    first, second = sides
    if groups > 1:
        share = first.size // groups
        left = sorted({entry // share for entry in first.keep})  # groups that still have something
        within = (group * second.size + entry for group in left for entry in second.keep)
        second = OldChannels(groups * second.size, tuple(within))
    return LayerChannels(second, first) if isinstance(module, _ConvTransposeNd) else LayerChannels(first, second)


@cache
def _all(size: int) -> OldChannels:
    return OldChannels(size, tuple(range(size)))


def _side(data: Mapping[str, Any]) -> OldChannels:
    size, keep = data["size"], tuple(data["keep"])
    plain = all(type(number) is int for number in (size, *keep))
    if not plain or not keep or list(keep) != sorted(set(keep)) or not 0 <= keep[0] <= keep[-1] < size:
        raise ValueError(f"channels that are left must be ascending and in [0, {size}), got {keep[:5]}")
    return OldChannels(size, keep)
