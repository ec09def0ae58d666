"""Holding masked entries at zero: cleared before a forward if anything wrote to them, gradients after a backward."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from lightning_prune.reconstruction.zeroing import INTEGERS, can_zero, is_unwritten, zero_

_ONE_AT_A_TIME = threading.RLock()  # a model may run in several threads, and a tensor be marked in one only
_running: Callable[[], int] = torch._C._current_graph_task_id


@dataclass(frozen=True)
class Zeros:
    """Entries of one dimension of one parameter that are held at zero."""

    parameter: str
    dim: int
    entries: Tensor

    def clear_(self, tensor: Tensor) -> Tensor:
        """Zero these entries in place; returns the tensor."""
        return tensor.index_fill_(self.dim, self.entries.to(tensor.device), 0)

    def cleared(self, tensor: Tensor) -> Tensor:
        """A copy with these entries zero."""
        return tensor.index_fill(self.dim, self.entries.to(tensor.device), 0)


class HeldParameter:
    """One parameter of one module, and what of it is held at zero."""

    __slots__ = ("captured", "clean", "masks", "module", "name", "zeros")

    def __init__(self, module: nn.Module, name: str, zeros: list[Zeros]) -> None:
        self.module = weakref.ref(module, self._forget)
        self.name = name
        self.zeros = zeros
        self.clean: nn.Parameter | None = None  # what stood here and is zero as long as nobody writes to it
        self.captured = False  # by a CUDA graph, which writes without a trace
        self.masks: list[Tensor] = []

    def _forget(self, _: Any) -> None:
        self.clean = None

    def parameter(self) -> nn.Parameter | None:
        """What stands here now."""
        module = self.module()
        return None if module is None else module._parameters.get(self.name)


class HoldZero:
    """Module pre-hook that clears masked entries. Finds parameters through the module, so copies keep working."""

    holds_masks = True

    def __init__(self, zeros: dict[str, list[Zeros]], held: Held) -> None:
        self.zeros = zeros
        self.held = held
        self.places: list[HeldParameter] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return HoldZero, (self.zeros, self.held)

    def __call__(self, module: nn.Module, _args: Any) -> None:
        """Clear the masked entries of the module's own parameters if need be, and of others that were written to."""
        if torch.compiler.is_dynamo_compiling():
            self.clear_(module)
            return
        own = module._parameters
        for place in self.places:
            clean = place.clean
            if clean is None or own.get(place.name) is not clean or not is_unwritten(clean) or _is_captured(clean):
                break
        else:
            if self.places:
                return
        self.held.clear_(self, module)

    def clear_(self, module: nn.Module) -> None:
        """Clear the masked entries of the module's parameters one by one."""
        for name in self.zeros:
            self.clear_one_(module, name)

    def clear_one_(self, module: nn.Module, name: str) -> None:
        """Clear the masked entries of one of the module's parameters."""
        parameter = getattr(module, name, None)
        if parameter is None:
            return  # taken away while another kernel, which its module folded, stands for it
        for item in self.zeros[name]:
            # .data: a module may run twice before backward, and autograd must not see a new version.
            item.clear_(parameter.data)


class Held:
    """What is held at zero in one model, together; a copy of the model gets its own as its modules run."""

    def __init__(self) -> None:
        self.places: list[HeldParameter] = []
        self._vectors: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        self._backward = (-1, False)  # the last one; whether gradients are cleared after it

    def __reduce__(self) -> tuple[Any, ...]:
        return Held, ()

    @staticmethod
    def of(model: nn.Module) -> Held:
        """That of masks already in force on the model, or a new one: what is marked has to be zero for all of them."""
        held = Held()
        for module in model.modules():
            for hook in module._forward_pre_hooks.values():
                if isinstance(hook, HoldZero) and hook.held.places is not held.places:
                    held.places += hook.held.places
                    hook.held.places = held.places
        return held

    def join(self, hold: HoldZero, module: nn.Module) -> None:
        """Let a module's parameters be cleared with the others."""
        if not hold.places:
            hold.places = [HeldParameter(module, name, zeros) for name, zeros in hold.zeros.items()]
            self.places += hold.places

    def leave(self, holds: Iterable[HoldZero]) -> None:
        """The opposite."""
        gone = {id(place) for hold in holds for place in hold.places}
        self.places[:] = [place for place in self.places if id(place) not in gone]

    def clear_(self, asking: HoldZero, module: nn.Module) -> None:
        """Clear the parameters of the module that asks, and those that were clean before somebody wrote to them."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
            asking.clear_(module)  # what is exported knows torch's operators only
            return
        with _ONE_AT_A_TIME:
            self.join(asking, module)
            found = [
                (place, clean)
                for place in self.places
                if (clean := place.clean) is not None and not is_unwritten(clean) and clean.dtype in INTEGERS
            ]
            for place in asking.places:
                parameter = module._parameters.get(place.name)
                if parameter is None or not can_zero(parameter, nn.Parameter):
                    asking.clear_one_(module, place.name)
                elif _is_captured(parameter) or parameter is not place.clean:
                    found.append((place, parameter))
            if any(_is_captured(parameter) for _, parameter in found):
                for place in self.places:
                    place.captured = True
            self._zero_(found, mark=True)
            torch.clear_autocast_cache()  # it would not see that weights changed
            for place, parameter in found:
                place.clean = parameter if is_unwritten(parameter) and not place.captured else None

    def hook(self, zeros: Sequence[Zeros]) -> Callable[[Tensor], Tensor | None]:
        """For a parameter's gradient: masked entries are cleared after the backward, or at once if others look."""

        def arrive(gradient: Tensor) -> Tensor | None:
            deferred = False
            if not torch.compiler.is_dynamo_compiling():
                task, deferred = self._backward
                if task != _running():
                    deferred = self._begin()
            if deferred or not zeros:
                return None
            gradient = gradient.clone()
            for item in zeros:
                item.clear_(gradient)
            return gradient

        return arrive

    def clear_gradients_(self) -> None:
        """Clear the gradients that have accumulated in the parameters."""
        found = []
        for place in self.places:
            parameter = place.parameter()
            gradient = None if parameter is None else parameter.grad
            if gradient is None:
                continue
            if can_zero(gradient, Tensor):
                found.append((place, gradient))
            else:
                for item in place.zeros:
                    item.clear_(gradient.data)
        self._zero_(found)

    def _begin(self) -> bool:
        """In a new backward: whether gradients can be cleared when it is over, all at once."""
        watched = any(_is_watched(place.parameter()) for place in self.places)
        deferred = not watched and not torch.is_grad_enabled() and _accumulates()
        if deferred:
            # Twice: what others, such as DDP, do with the gradients when a backward is over comes first.
            queue = Variable._execution_engine.queue_callback
            queue(lambda: queue(self.clear_gradients_))
        self._backward = (_running(), deferred)
        return deferred

    def _zero_(self, items: Sequence[tuple[HeldParameter, Tensor]], mark: bool = False) -> None:
        tensors = [tensor for _, tensor in items]
        masks = [self._masks(place, tensor) for place, tensor in items]
        if len({id(tensor) for tensor in tensors}) == len(tensors) == sum(map(len, masks)):
            if tensors:
                zero_(tensors, [mask for (mask,) in masks], mark)
            return
        # One mask after the other: a fused kernel must not write the same memory twice.
        merged: dict[int, tuple[Tensor, list[Tensor]]] = {}
        for tensor, several in zip(tensors, masks, strict=True):
            merged.setdefault(id(tensor), (tensor, []))[1].extend(several)
        for k in reversed(range(max(len(several) for _, several in merged.values()))):
            pairs = [(tensor, several[k]) for tensor, several in merged.values() if len(several) > k]
            zero_([tensor for tensor, _ in pairs], [mask for _, mask in pairs], mark and k == 0)

    def _masks(self, place: HeldParameter, like: Tensor) -> list[Tensor]:
        """1 where a tensor like the parameter trains, 0 where it is held; they broadcast to it."""
        masks = place.masks
        if not masks or masks[0].dtype is not INTEGERS[like.dtype] or masks[0].device != like.device:
            place.masks = masks = [
                self._vector(item, like).view([-1 if k == item.dim else 1 for k in range(like.dim())])
                for item in place.zeros
            ]
        return masks

    def _vector(self, item: Zeros, like: Tensor) -> Tensor:
        """One tensor for all parameters that lose the same channels."""
        size, dtype = like.shape[item.dim], INTEGERS[like.dtype]
        key = (id(item.entries), size, dtype, like.device)
        if key not in self._vectors:
            ones = torch.ones(size, dtype=dtype, device=like.device)
            self._vectors[key] = item.entries, ones.index_fill_(0, item.entries.to(like.device), 0)
        return self._vectors[key][1]


def _accumulates() -> bool:
    """Whether the backward that runs ends in ``.grad``; the results of `torch.autograd.grad` are given back."""
    try:
        return bool(torch._C._will_engine_execute_node(torch._C._current_autograd_node()))
    except RuntimeError:
        return False


def _is_captured(parameter: Tensor) -> bool:
    return parameter.is_cuda and torch.cuda.is_current_stream_capturing()


def _is_watched(parameter: Any) -> bool:
    """Whether others have hooks that see the gradient before the backward is over: loggers, optimizers in backward."""
    return parameter is not None and (
        len(parameter._backward_hooks or ()) > 1 or bool(parameter._post_accumulate_grad_hooks)
    )
