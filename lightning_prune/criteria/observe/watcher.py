"""What watches one kind of site: hooks for the time of a batch, gradients awaited, one sum per key."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.utils.parametrize import is_parametrized
from typing_extensions import Self

from lightning_prune.criteria.base import Tap
from lightning_prune.criteria.observe.functional_calls import FunctionalCalls
from lightning_prune.errors import ScoreError
from lightning_prune.graph.groups import Group, Layer


@dataclass
class Seen:
    """What one tap has seen of some samples under one key in the current batch; ``partial`` is (samples, channels).

    Attributes:
        callers: paths of the modules that have shown it something.
    """

    tap: Tap
    partial: Tensor
    positions: int = 0
    differentiated: bool = False
    callers: set[str] = field(default_factory=set)

    def add(self, found: Tensor, positions: int = 0, *, differentiated: bool = False) -> None:
        self.partial = self.partial + found.to(self.partial.device)
        self.positions += positions
        self.differentiated |= differentiated


class Watcher(ABC):
    """Shows taps one kind of site, inside ``with``: one batch."""

    see: Callable[..., Any]  # a call of a module that has an audience, see `calls_of`

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.audience: dict[str, list[Any]] = {}  # of every module or parameter that is watched
        self.shapes: dict[str, tuple[int, ...]] = {}  # of the sum of every key
        self.seen: dict[str, dict[int, Seen]] = {}  # per key and number of samples, in the current batch
        self.edges: list[GradientEdge] = []  # what to differentiate with respect to
        self.without_grad: set[str] = set()  # keys whose layers ever ran where no gradient can be taken
        self.hooks = ExitStack()

    @abstractmethod
    def listen(self, group: Group, tap: Tap) -> None:
        """Let a tap see its site of every layer of a group."""

    def start(self) -> None:
        """Enter into `hooks` what lasts for a batch."""
        self.hooks.enter_context(calls_of(self.model, self.audience, self.see))

    def __enter__(self) -> Self:
        with self.hooks:  # closed if it cannot start
            self.start()
            self.hooks = self.hooks.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.hooks.close()
        self.seen.clear()
        self.edges.clear()

    def open(self, where: str, key: str, tap: Tap, shape: tuple[int, int], device: torch.device) -> Seen:
        """The sum of a key, (samples, channels), which starts from zero.

        Calls of one module with other numbers of samples (of two loaders, labelled and not) are of other samples; of
        two modules that read the same channels they cannot be told apart.
        """
        known = self.seen.setdefault(key, {})
        if shape[0] not in known:
            if known and all(where not in seen.callers for seen in known.values()):
                samples, seen = next(iter(known.items()))
                raise ScoreError(
                    f"{where}: called with {shape[0]} samples where {min(seen.callers)}, which reads the same "
                    f"channels, has {samples}, which cannot be added up; score by another criterion, such as Taylor"
                )
            known[shape[0]] = Seen(tap, torch.zeros(shape, dtype=torch.float64, device=device))
        seen = known[shape[0]]
        seen.callers.add(where)
        return seen

    def found(self) -> Iterator[tuple[str, Seen]]:
        """What was seen in the current batch, with its key."""
        return ((key, seen) for key, known in self.seen.items() for seen in known.values())

    def await_gradient(self, where: str, tensor: Tensor, value: Tensor, see: Callable[[Tensor, Tensor], None]) -> None:
        """Hold a value until the gradient of a tensor arrives in this batch, and see both."""
        held = [value]

        def arrive(gradient: Tensor) -> None:
            if not held:
                raise ScoreError(
                    f"{where}: more than one backward pass reached it in one batch; add the losses up first"
                )
            with exactly(gradient):
                see(held.pop(), gradient.detach())

        self.hooks.callback(tensor.register_hook(arrive).remove)
        self.edges.append(get_gradient_edge(tensor))


@contextmanager
def calls_of(model: nn.Module, paths: Iterable[str], see: Callable[[str, nn.Module, Any, Any], Any]) -> Iterator[None]:
    """Show every call of some modules: ``see(path, module, first input, output)``.

    What ``see`` returns goes on in place of the output, unless it is None. It comes before anything works on the
    output in place.
    """
    replaced: set[str] = set()

    def show(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if recomputing():  # what goes on has to require a gradient where it did before
            return tracked(output)[1] if path in replaced else None
        replacement = see(path, module, first_input(args, kwargs), output)
        if replacement is not None:
            replaced.add(path)
        return replacement

    modules = {path: model.get_submodule(path) for path in paths}
    with ExitStack() as hooks:
        for path, module in modules.items():
            if not isinstance(module, nn.MultiheadAttention):  # which returns what its last projection makes
                hooks.callback(module.register_forward_hook(partial(show, path), with_kwargs=True).remove)
        hooks.enter_context(
            FunctionalCalls(modules, after=lambda path, module, value, out: show(path, module, (value,), {}, out))
        )
        yield


def recomputing() -> bool:
    """Whether activation checkpointing repeats the forward pass inside the backward pass: it has been seen then."""
    return torch._C._current_graph_task_id() != -1


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a module was called on."""
    return args[0] if args else next(iter(kwargs.values()), None)


@contextmanager
def exactly(tensor: Tensor) -> Iterator[None]:
    """Kernels without a graph, and without autocast, which would run them in half precision."""
    with torch.no_grad(), torch.autocast(tensor.device.type, enabled=False):
        yield


def tracked(output: Tensor) -> tuple[Tensor, Tensor | None]:
    """A tensor whose gradient can be awaited, and what goes on in its place if all upstream is frozen."""
    if output.requires_grad:
        return output, None
    leaf = output.detach().requires_grad_()
    return leaf, leaf.clone()  # what goes on may be overwritten in place


def check_batch(path: str, end: str, module: nn.Module, tensor: Tensor) -> None:
    """Refuse an input or output without a batch dimension."""
    dims = 3 if isinstance(module, nn.RNNBase) else _rank(module)
    if tensor.ndim < 2 or (dims > 2 and tensor.ndim != dims):
        raise ScoreError(f"{path}: its {end} has shape {list(tensor.shape)}; a batch dimension is needed")


def channel_dim(module: nn.Module) -> int:
    """Where the channels lie in what a module takes and returns: last at linear and recurrent layers."""
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return -1
    return -1 if _rank(module) == 2 else 1


def _rank(module: nn.Module) -> int:
    """Of its weight, 0 without; one that is computed at every look is not looked at."""
    if isinstance(module, nn.MultiheadAttention):
        return 2
    if is_parametrized(module, "weight"):
        sources = module.get_submodule("parametrizations.weight")
        return max(parameter.ndim for parameter in sources.parameters(recurse=False))
    return getattr(getattr(module, "weight", None), "ndim", 0)


def samples_first(module: nn.Module, tensor: Tensor) -> Tensor:
    """What a module takes, samples in the first dimension: recurrent layers may have time steps there."""
    return tensor.transpose(0, 1) if isinstance(module, nn.RNNBase) and not module.batch_first else tensor


def key_of(group: Group, layer: Layer, tap: Tap) -> str:
    """Under what the sum of a tap is kept for a layer; `Tap.joint` ones have it under the group's first."""
    owner = group.layers[0] if tap.joint else layer
    return f"{group.name}/{owner.name}/{tap.name}"
