"""Which entries of its dense tensors a model still has: noted at every cut, so that nothing has to be guessed later."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn
from torch.nn.modules.conv import _ConvNd

from lightning_prune.model_state.cutting import DENSE, Cut, dense_shapes

HISTORY = "_entries_kept_by_pruning"


class Kept(NamedTuple):
    """Of one dimension of a dense tensor its size, and the entries that are left."""

    size: int
    entries: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class History:
    """What all cuts together left.

    Attributes:
        kept: by tensor and dimension, of the dimensions that lost some.
        groups: {module path: ``groups`` of the dense convolution}, where there are several.
    """

    kept: Mapping[str, Mapping[int, Kept]] = field(default_factory=dict)
    groups: Mapping[str, int] = field(default_factory=dict)

    def after(self, cuts: Iterable[Cut], shapes: Mapping[str, Sequence[int]]) -> History:
        """The same after further cuts of tensors that had these shapes."""
        kept = {name: dict(dims) for name, dims in self.kept.items()}
        shared: dict[tuple[int, int], Kept] = {}  # most cuts of a group are equal: so is what is noted
        for cut in cuts:
            before = kept.setdefault(cut.tensor, {}).get(cut.dim)
            key = id(before), id(cut.keep)
            if key not in shared:
                left = cut.keep.tolist()
                if before is None:
                    shared[key] = Kept(shapes[cut.tensor][cut.dim], tuple(left))
                else:
                    shared[key] = Kept(before.size, tuple(before.entries[entry] for entry in left))
            kept[cut.tensor][cut.dim] = shared[key]
        return History(kept, self.groups)


def history_of(model: nn.Module) -> History | None:
    """What is left of a model's dense tensors; None if it was cut by something that did not note it.

    Every module knows its own, so that a part of a model that was cut can be asked, too.
    """
    kept: dict[str, dict[int, Kept]] = {}
    groups = {path: module.groups for path, module in model.named_modules() if isinstance(module, _ConvNd)}
    for path, module in model.named_modules():
        noted = vars(module).get(HISTORY)
        if noted is not None:
            start = f"{path}." if path else ""
            kept |= {
                f"{start}{name}": {dim: Kept(*of) for dim, of in dims.items()} for name, dims in noted["kept"].items()
            }
            groups |= {path: noted["groups"]} if path in groups else {}
    if not kept and dense_shapes(model):
        return None
    first = {*dict(model.named_parameters()), *dict(model.named_buffers())}  # of the names that shared tensors have
    kept = {name: dims for name, dims in kept.items() if name in first}
    return History(kept, {path: count for path, count in groups.items() if count > 1})


def forget_cuts_(model: nn.Module) -> None:
    """Of a model that is dense again."""
    remember_history_(model, None)
    vars(model).pop(DENSE, None)


def remember_history_(model: nn.Module, history: History | None) -> None:
    """Note what is left, as plain data that any pickle of a module can hold; None: it is not known."""
    for module in model.modules():
        vars(module).pop(HISTORY, None)
    if history is None:
        return
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    kept = {id(tensors[name]): dims for name, dims in history.kept.items() if name in tensors}
    for path, module in model.named_modules():
        own = {name: kept[id(tensor)] for name, tensor in _own(module) if id(tensor) in kept}  # also shared ones
        if own:
            plain = {name: {dim: tuple(of) for dim, of in dims.items()} for name, dims in own.items()}
            vars(module)[HISTORY] = {"kept": plain, "groups": history.groups.get(path, 1)}


def _own(module: nn.Module) -> Iterator[tuple[str, object]]:
    return ((name, tensor) for own in (module._parameters, module._buffers) for name, tensor in own.items())
