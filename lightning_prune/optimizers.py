"""Keep optimizer state in step with the parameters when channels are masked or removed."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Change = Callable[[Tensor], Tensor]


def change_state_(optimizers: Iterable[Optimizer], parameter: nn.Parameter, shape: torch.Size, change: Change) -> None:
    """Apply ``change`` to every state tensor that has the parameter's (old) ``shape``: momentum, Adam's moments, ...

    Step counters and other scalars stay as they are.
    """
    for optimizer in optimizers:
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == shape and value.dim() > 0:
                state[key] = change(value)


def unwrap(optimizers: Iterable[object]) -> list[Optimizer]:
    """Plain torch optimizers, out of Lightning's wrappers where needed.

    Raises:
        TypeError: something is not an optimizer.
    """
    plain = []
    for optimizer in optimizers:
        inner = getattr(optimizer, "optimizer", optimizer)
        if not isinstance(inner, Optimizer):
            raise TypeError(f"expected torch optimizers, got {type(optimizer).__name__}")
        plain.append(inner)
    return plain
