"""Parameters and buffers to which the model's own code gives other values while it runs.

A fold of branches into one kernel, a teacher's moving average, a queue of features: whatever is written, or put in a
tensor's place (``parameter.data = ...``, no operator at all), is tied to it dimension by dimension. What has no
counterpart stays.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from lightning_prune.graph.label_space import LabelSpace
from lightning_prune.graph.labels import NO_LABEL, Labels, TensorInfo
from lightning_prune.model_state.originals import Entry, Originals, same_place, storage_of

if TYPE_CHECKING:
    from lightning_prune.graph.operator_call import OperatorCall

_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


class Assignments:
    """Finds out, during one run, where a model's tensors get their values from.

    What depends on parameters alone is held for the run, and for a while what has the shape of a buffer: a parameter
    may get its memory, which is all that can be seen of ``.data = ...`` afterwards.

    Attributes:
        paths: the tensors that got other values.
    """

    def __init__(
        self,
        space: LabelSpace,
        known: Mapping[Tensor, TensorInfo],
        originals: Originals,
        info: Callable[[Tensor], TensorInfo],
    ) -> None:
        self._space, self._known, self._info, self._entries = space, known, info, originals.entries
        self.paths: set[str] = set()
        self._by_module: dict[int, list[Entry]] = {}
        self._by_tensor: dict[int, Entry] = {}
        self._owners: dict[int, Entry] = {}  # of memory
        self._held: dict[int, list[tuple[Tensor, Tensor]]] = {}  # by memory: what lies there, whose labels it has
        self._met: dict[tuple[int, int, int], Tensor] = {}
        self._recent: deque[Tensor] = deque(maxlen=32)
        self._shapes = {entry.data.shape for entry in originals.entries if entry.own is entry.module._buffers}
        for entry in originals.entries:
            if entry.tensor in known:
                self._by_module.setdefault(id(entry.module), []).append(entry)
                self._by_tensor.setdefault(id(entry.tensor), entry)
                for other in self._held.get(storage_of(entry.data), ()):
                    self._shared(entry, *other)
                self._own(entry, entry.data)

    def _shared(self, entry: Entry, data: Tensor, tensor: Tensor) -> None:
        """Two of the model's tensors lie in the same memory from the start."""
        own, other = self._known[entry.tensor], self._known[tensor]
        if tensor is entry.tensor or not _overlap(entry.data, data):
            return
        reason = f"is part of {entry.path!r}, which shares its memory with another tensor"
        if same_place(entry.data, data):
            self._give(entry, own, data.shape, other, data.shape, reason)
        else:
            self._freeze((*own.labels, *other.labels), reason)

    def _own(self, entry: Entry, data: Tensor) -> None:
        storage = storage_of(data)
        self._owners.setdefault(storage, entry)
        self._held.setdefault(storage, []).append((data, entry.tensor))

    def hold(self, tensor: Tensor, info: TensorInfo) -> None:
        """Remember a result whose memory a tensor of the model may get."""
        if not info.labels:
            return
        if info.data:
            if tensor.shape in self._shapes:
                self._recent.append(tensor)
        else:
            self._held.setdefault(storage_of(tensor), []).append((tensor, tensor))

    def source(self, tensor: Tensor, *, but: Tensor | None = None) -> Tensor | None:
        """The tensor whose labels one has that no operator made (``.data``), by the memory where it lies."""
        near = [*self._held.get(storage_of(tensor), ()), *((recent, recent) for recent in self._recent)]
        return next((owner for data, owner in near if owner is not but and same_place(tensor, data)), None)

    def owns(self, tensor: Tensor) -> bool:
        """Whether it lies in the memory of a parameter or buffer."""
        return storage_of(tensor) in self._owners

    def meet(self, module: nn.Module) -> None:
        """A module starts or ends: look at its own tensors."""
        for entry in self._by_module.get(id(module), ()):
            self._look(entry, entry.own.get(entry.name))

    def meet_all(self, model: nn.Module) -> None:
        """The run ends: look at every tensor, also where a whole module was replaced by another."""
        now = {
            **dict(model.named_parameters(remove_duplicate=False)),
            **dict(model.named_buffers(remove_duplicate=False)),
        }
        for entry in self._entries:
            if id(entry.tensor) in self._by_tensor:
                self._look(entry, now.get(entry.path))

    def meet_arguments(self, args: Sequence[Any]) -> None:
        """An operator runs: look at those of its arguments that are the model's tensors."""
        for value in args:
            if (entry := self._by_tensor.get(id(value))) is not None:
                self._look(entry, entry.tensor)

    def _look(self, entry: Entry, current: Any) -> None:
        """Whether another tensor is in its place, or other memory in the tensor."""
        if current is entry.tensor and same_place(current, entry.data):
            return
        if not isinstance(current, Tensor):
            return
        with _disable_current_modes():
            self._assigned(entry, current)

    def _assigned(self, entry: Entry, current: Tensor) -> None:
        own, reason = self._known[entry.tensor], f"is part of {entry.path!r}, to which the model's code assigns"
        if _is_wrapped(current):
            self._freeze(own.labels, f"{reason} a batch of tensors")
            return
        key = id(entry.tensor), storage_of(current), id(current)
        if key in self._met:
            return
        self.paths.add(entry.path)
        self._met[key] = current.data if current is entry.tensor else current
        source = self.source(current, but=entry.tensor) if current is entry.tensor else current
        value = TensorInfo() if source is None else self._info(source)
        if current.shape == entry.data.shape and (value.labels or value.uniform):
            self._give(entry, own, current.shape, value, current.shape, reason)
        elif own.labels:
            reason += " values that do not come from its channels"
            self._freeze((*own.labels, *value.labels), reason)
            for _, owner in self._held.get(storage_of(current), ()):
                self._freeze(self._info(owner).labels, reason)
        self._own(entry, current.data)

    def write(self, call: OperatorCall, before: TensorInfo, value: TensorInfo) -> TensorInfo:
        """An operator wrote ``value`` into such memory. Returns what is known of it from now on: what was before."""
        tensor = call.outputs[0]
        entry = self._owners[storage_of(tensor)]
        self.paths.add(entry.path)
        extents = call.argument("src").shape if call.name == "copy" else tensor.shape
        self._give(
            entry, before, tensor.shape, value, extents, f"is part of {entry.path!r}, which {call.where} writes to"
        )
        return before

    def _give(
        self, entry: Entry, own: TensorInfo, shape: torch.Size, value: TensorInfo, extents: torch.Size, reason: str
    ) -> None:
        """Tie a tensor's labels to those of its new value, of shape ``extents``; what has no counterpart must stay."""
        masked = entry.own is entry.module._parameters
        new = [labels.expand(shape) for labels in value.labels]
        for old in own.labels:
            near = [labels for labels in new if set(labels.dims) & set(old.dims)]
            if len(near) == 1 and near[0].dims == old.dims:
                new = [labels for labels in new if labels is not near[0]]
                self._tie(old.region(), near[0].region(), masked, reason)
            elif near or masked or not _follows(old, value, extents, shape):
                self._freeze([old], f"{reason} values that do not come from its channels")
        self._freeze(new, f"{reason} where their number is fixed")

    def _tie(self, old: Labels, new: Labels, masked: bool, reason: str) -> None:
        if torch.equal(old.ids, new.ids) and not (masked and new.live.any()):
            return
        both = (old.ids != NO_LABEL) & (new.ids != NO_LABEL)
        self._space.tie(old.ids[both], new.ids[both])
        self._space.assigned.append((old.ids[both], new.ids[both]))
        for labels in (old, new):
            self._space.freeze(labels.ids[~both], f"{reason} values that do not come from its channels")
        if masked:
            constant = (new.live & ~old.live).expand(old.ids.shape)
            self._space.freeze(old.ids[constant], f"{reason} values that are not zero when it is masked")

    def _freeze(self, labels: Sequence[Labels], reason: str) -> None:
        for one in labels:
            self._space.freeze(one.ids, reason)


def _follows(old: Labels, value: TensorInfo, extents: torch.Size, shape: torch.Size) -> bool:
    """Whether a value without labels there has whatever extent the tensor has."""
    padded = (1,) * (len(shape) - len(extents)) + tuple(extents)
    return value.uniform or all(padded[d] == 1 for d in old.dims)


def _overlap(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors on one memory have elements in common, as far as their ends tell."""
    starts = [tensor.storage_offset() for tensor in (first, second)]
    ends = [
        start + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        for start, tensor in zip(starts, (first, second), strict=True)
    ]
    return bool(first.numel() and second.numel() and max(starts) <= min(ends))
