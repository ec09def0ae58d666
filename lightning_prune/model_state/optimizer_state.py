"""Keep optimizer state in step with the parameters when channels are masked or removed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from lightning_prune.errors import OptimizerError

Change = Callable[[Tensor], Tensor]


def change_state_(optimizers: Iterable[Optimizer], parameter: Tensor, shape: torch.Size, change: Change) -> None:
    """Apply ``change`` to every state tensor that has the parameter's (old) ``shape``: momentum, Adam's moments, ...

    Step counters and other scalars stay as they are.
    """
    for optimizer in optimizers:
        for key, value in (state := optimizer.state.get(parameter, {})).items():
            if isinstance(value, Tensor) and value.shape == shape and value.dim() > 0:
                state[key] = change(value)


POWERS = {  # what optimizers keep, in which power of the gradient
    **dict.fromkeys(("exp_avg", "momentum_buffer", "exp_inf", "grad_avg", "prev"), 1),
    **dict.fromkeys(("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"), 2),
}


def rescale_state_(optimizers: Iterable[Optimizer], parameter: Tensor, factor: float) -> None:
    """A parameter was multiplied by ``factor``: its gradient is as many times smaller, and what is made of that."""
    for optimizer in optimizers:
        for key, value in (state := optimizer.state.get(parameter, {})).items():
            if key in POWERS and isinstance(value, Tensor) and value.shape == parameter.shape:
                state[key] = value / factor ** POWERS[key]


def check_sliceable(optimizers: Iterable[Optimizer]) -> None:
    """Refuse optimizers whose state, after one step on a parameter of their own, is neither scalar nor of its shape.

    Adafactor's row and column averages or the history of LBFGS belong to no channel.
    """
    for optimizer in optimizers:
        probe = _probe(optimizer)
        plain = {"foreach": None, "fused": None, "capturable": False}  # these suit the real parameters' device
        known = inspect.signature(type(optimizer)).parameters  # torch adds defaults when it loads a state
        given = {name: value for name, value in optimizer.defaults.items() if name in known}
        settings = {name: plain.get(name, value) for name, value in given.items()}
        try:
            trial = type(optimizer)([probe], **settings)
            probe.grad = torch.ones_like(probe)
            trial.step(lambda: 0.0)  # LBFGS needs a closure, and takes a number
        except Exception:  # noqa: BLE001  # an optimizer that wants more than parameters cannot be tried
            continue
        _check_fits(trial, probe)


def check_attributes(optimizers: Iterable[Optimizer]) -> None:
    """Refuse optimizers that keep weights in attributes of their own, where nothing can find and cut them."""
    for optimizer in optimizers:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        shapes = {parameter.shape for parameter in parameters if parameter.numel() > 1}
        for name, value in vars(optimizer).items():
            if name in ("param_groups", "state", "defaults"):
                continue
            kept = (one for one in tree_leaves(value) if isinstance(one, Tensor) and one.shape in shapes)
            found = next((one for one in kept if not any(one is parameter for parameter in parameters)), None)
            if found is not None:
                raise OptimizerError(
                    f"{type(optimizer).__name__} keeps a tensor of shape {list(found.shape)} in its attribute "
                    f"{name!r}, which nothing cuts along with channels. Keep it in optimizer.state[parameter], make it "
                    "in the first step after reconstruction, or prune before (lightning_prune.prune)"
                )


def _probe(optimizer: Optimizer) -> nn.Parameter:
    """In the shape of its largest parameter, but no larger than it takes: some keep averages of large matrices only."""
    shapes = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
    largest = max(shapes, key=torch.Size.numel, default=torch.Size([3, 2]))
    return nn.Parameter(torch.ones([min(size, 128) for size in largest]))


def check_state(optimizers: Iterable[Optimizer], parameters: Iterable[Tensor]) -> None:
    """Refuse optimizers that hold, of parameters that are to be cut, what is neither scalar nor of their shape."""
    cut = {id(parameter) for parameter in parameters}
    for optimizer in optimizers:
        if any(id(parameter) in cut for group in optimizer.param_groups for parameter in group["params"]):
            for parameter in optimizer.state:  # all: LBFGS keeps everything with the first
                _check_fits(optimizer, parameter)


def _check_fits(optimizer: Optimizer, parameter: Tensor) -> None:
    for name, value in optimizer.state[parameter].items():
        if isinstance(value, Tensor):
            fits = value.numel() == 1 or value.shape == parameter.shape
        else:
            fits = value is None or isinstance(value, (int, float))
        if not fits:
            what = f"of shape {list(value.shape)}" if isinstance(value, Tensor) else f"({type(value).__name__})"
            raise OptimizerError(
                f"{type(optimizer).__name__} keeps {name!r} {what} for a parameter of shape {list(parameter.shape)}: "
                "it cannot be cut along with channels. Reconstruct before its first step (reconstruct='before' without "
                "a schedule), or use an optimizer whose state has the shape of its parameters, such as SGD or AdamW"
            )


def unwrap(optimizers: Iterable[object]) -> list[Optimizer]:
    """Plain torch optimizers, out of Lightning's wrappers where needed, with those that they run (SAM, Lookahead).

    A `TypeError` for anything else.
    """
    plain: list[Optimizer] = []
    for optimizer in optimizers:
        inner = optimizer if isinstance(optimizer, Optimizer) else getattr(optimizer, "optimizer", optimizer)
        if not isinstance(inner, Optimizer):
            raise TypeError(f"expected torch optimizers, got {type(optimizer).__name__}")
        found = [inner]
        for one in found:  # grows
            found += [part for part in vars(one).values() if isinstance(part, Optimizer) and part not in found]
        plain += found
    return plain
