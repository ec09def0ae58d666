"""Keep optimizer state in step with the parameters when channels are masked or removed."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

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
        probe = nn.Parameter(torch.ones(3, 2))
        plain = {"foreach": None, "fused": None, "capturable": False}  # these suit the real parameters' device
        settings = {name: plain.get(name, value) for name, value in optimizer.defaults.items()}
        try:
            trial = type(optimizer)([probe], **settings)
            probe.grad = torch.ones_like(probe)
            trial.step(lambda: 0.0)  # LBFGS needs a closure, and takes a number
        except Exception:  # noqa: BLE001  # an optimizer that wants more than parameters cannot be tried
            continue
        _check_fits(trial, probe)


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
    """Plain torch optimizers, out of Lightning's wrappers where needed; a `TypeError` for anything else."""
    plain = []
    for optimizer in optimizers:
        inner = getattr(optimizer, "optimizer", optimizer)
        if not isinstance(inner, Optimizer):
            raise TypeError(f"expected torch optimizers, got {type(optimizer).__name__}")
        plain.append(inner)
    return plain
