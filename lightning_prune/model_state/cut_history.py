"""Which entries of its dense tensors a model still has: noted at every cut, so that nothing has to be guessed later."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.conv import _ConvNd

from lightning_prune.model_state.cutting import Cut, dense_shapes

HISTORY = "_entries_kept_by_pruning"

Kept = Mapping[str, Mapping[int, tuple[int, ...]]]


@dataclass(frozen=True, eq=False)
class History:
    """What all cuts together left.

    Attributes:
        kept: {tensor: {dimension: its dense entries that are left}}, of the dimensions that lost some.
        groups: {module path: ``groups`` of the dense convolution}, where there are several.
    """

    kept: Kept = field(default_factory=dict)
    groups: Mapping[str, int] = field(default_factory=dict)

    def after(self, cuts: Iterable[Cut]) -> History:
        """The same after further cuts, which count the entries that are left."""
        kept = {name: dict(dims) for name, dims in self.kept.items()}
        shared: dict[tuple[int, int], tuple[int, ...]] = {}  # most cuts of a group are equal: so is what is noted
        for cut in cuts:
            before = kept.setdefault(cut.tensor, {}).get(cut.dim)
            key = id(before), id(cut.keep)
            if key not in shared:
                left = cut.keep.tolist()
                shared[key] = tuple(left if before is None else (before[entry] for entry in left))
            kept[cut.tensor][cut.dim] = shared[key]
        return History(kept, self.groups)


def history_of(model: nn.Module) -> History | None:
    """What is left of a model's dense tensors; None if it was cut by something that did not note it."""
    found = vars(model).get(HISTORY)
    if found is None:
        return None if dense_shapes(model) else History({}, conv_groups(model))
    return History(**found)


def remember_history_(model: nn.Module, history: History | None) -> None:
    """Note what is left, as plain data that any pickle of the model can hold; None: it is not known."""
    vars(model).pop(HISTORY, None)
    if history is not None:
        vars(model)[HISTORY] = vars(history)


def conv_groups(model: nn.Module) -> dict[str, int]:
    """{path: groups} of the convolutions that have several."""
    convolutions = ((path, module) for path, module in model.named_modules() if isinstance(module, _ConvNd))
    return {path: module.groups for path, module in convolutions if module.groups > 1}
