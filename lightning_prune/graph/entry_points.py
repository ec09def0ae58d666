"""Ways into a model's code: its forward on example inputs, a step of training on a batch, any callable."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import TraceError
from lightning_prune.graph.running import RunningModules, call_model, map_tensors, tensors_in

IMAGE_CHANNELS = (1, 3, 4)


@dataclass(frozen=True)
class EntryPoint:
    """One way into the model's code.

    Attributes:
        name: for messages.
        call: runs a model, which may be a copy, on the inputs.
        inputs: None if the callable holds its own.
        modes: the train flags to run it with; empty: eval, and train if the code asks for the flag.
        required: a failure is an error, else only noted.
        deployed: what the pruned model is for; layers that only other entry points run stay whole.
        borrowed: the inputs are another one's, so that a failure says little.
        varied: the one that it was made of, with inputs of another size.
    """

    name: str
    call: Callable[[nn.Module, Any], Any]
    inputs: Any = None
    modes: tuple[bool, ...] = ()
    required: bool = True
    deployed: bool = True
    borrowed: bool = False
    varied: EntryPoint | None = None

    @property
    def opaque(self) -> bool:
        """Whether its inputs cannot be changed."""
        return self.inputs is None

    def run(self, model: nn.Module, running: RunningModules) -> Any:
        """Run it; code outside of any forward counts as the model's own."""
        if is_forward(self):
            return self.call(model, self.inputs)
        with running.inside(model):
            return self.call(model, self.inputs)

    @property
    def samples(self) -> int:
        """How many its batch has: the images of a list, else the leading size of its first tensor."""
        listed = _listed(self.inputs, outer=True)
        return listed or next((len(tensor) for tensor in tensors_in(self.inputs) if tensor.dim()), 0)

    def own(self) -> EntryPoint:
        """The same on copies of its tensors: a model may change its inputs in place."""
        return self.mapped(lambda tensor: tensor.detach().clone())

    def mapped(self, function: Callable[[Tensor], Tensor]) -> EntryPoint:
        """The same with other input tensors."""
        return replace(self, inputs=map_tensors(function, self.inputs))


def entry_points(example_inputs: Any, also: Sequence[Any] = ()) -> list[EntryPoint]:
    """The forward on example inputs, and what is given as ``also``: further inputs, callables or entry points.

    Raises:
        TraceError: ``also`` is no list or tuple, or holds a module.
    """
    if not isinstance(also, (list, tuple)):
        raise TraceError(
            "also must be a list of further inputs (each a tensor, a tuple or a dict, as the model's forward takes "
            f"them) and callables that take the model, got {type(also).__name__}"
        )
    return [_entry("forward", example_inputs), *(_entry(f"also[{k}]", item) for k, item in enumerate(also))]


def _entry(name: str, item: Any) -> EntryPoint:
    if isinstance(item, EntryPoint):
        return item
    if isinstance(item, nn.Module):
        raise TraceError(f"{name} is a module; give inputs, or a callable that takes the model: lambda model: ...")
    if callable(item) and not isinstance(item, (Tensor, Mapping)):
        return EntryPoint(name, lambda model, _: item(model))
    return EntryPoint(name, call_model, item)


def is_forward(entry: EntryPoint) -> bool:
    """Whether it is a plain call of the model."""
    return entry.call is call_model


def head(entry: EntryPoint, samples: int) -> EntryPoint:
    """The same on the first few samples of its batch."""
    leading = entry.samples
    return entry if leading <= samples else replace(entry, inputs=_head(entry.inputs, leading, samples))


def _listed(value: Any, *, outer: bool = False) -> int:
    """How many samples a list holds: images (C, H, W), as detectors take them, or each with its target; 0: no such.

    Tensors that stand side by side in a batch itself may as well be (N, L, C).
    """
    if isinstance(value, Mapping):
        return next((found for item in value.values() if (found := _listed(item))), 0)
    if type(value) not in (list, tuple):
        return 0
    side_by_side = outer and any(isinstance(item, Tensor) for item in value)
    if len(value) and not side_by_side and all(_is_sample(item) for item in value):
        return len(value)
    return next((found for item in value if (found := _listed(item))), 0)


def _is_sample(value: Any) -> bool:
    first = next((tensor for tensor in tensors_in(value) if tensor.dim()), None)
    if first is None or first.dim() != 3 or len(first) not in IMAGE_CHANNELS:
        return False
    pixels = first.is_floating_point() or first.dtype == torch.uint8
    return pixels and (first is value or not _listed(value))


def _head(value: Any, leading: int, samples: int) -> Any:
    if isinstance(value, Tensor):
        return value[:samples] if value.dim() and len(value) == leading else value
    if type(value) is dict:
        return {key: _head(item, leading, samples) for key, item in value.items()}
    if type(value) in (list, tuple):
        if len(value) == leading and leading > samples:
            return value[:samples]
        return type(value)(_head(item, leading, samples) for item in value)
    return value


@contextmanager
def double_by_default() -> Iterator[None]:
    """Tensors that the model's code makes are float64 too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
