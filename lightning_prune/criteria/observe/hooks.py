"""The one way to look at what a module is called on and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

See = Callable[[str, nn.Module, Any, Any], Any]


@contextmanager
def calls_of(model: nn.Module, paths: Iterable[str], see: See) -> Iterator[None]:
    """Show every call of some modules: ``see(path, module, first input, output)``; hooks are gone afterwards.

    What ``see`` returns goes on in place of the output, unless it is None. It comes before anything works on the
    output in place.

    Example:
        >>> model, seen = nn.Sequential(nn.Linear(1, 2), nn.ReLU()), []
        >>> with calls_of(model, ["0"], lambda path, module, value, output: seen.append((path, output.shape))):
        ...     _ = model(torch.zeros(3, 1))
        >>> seen
        [('0', torch.Size([3, 2]))]
    """
    with ExitStack() as hooks:
        for path in paths:
            handle = model.get_submodule(path).register_forward_hook(partial(_show, see, path), with_kwargs=True)
            hooks.callback(handle.remove)
        yield


def recomputing() -> bool:
    """Whether activation checkpointing repeats the forward pass inside the backward pass: it has been seen then."""
    return torch._C._current_graph_task_id() != -1


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a module was called on."""
    return args[0] if args else next(iter(kwargs.values()), None)


def _show(see: See, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    return None if recomputing() else see(path, module, first_input(args, kwargs), output)
