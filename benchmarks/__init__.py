"""Scripts that measure what the README and the closing notes claim."""

import time
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Operators(TorchDispatchMode):
    """Counts the operators that are dispatched inside."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def seconds(step: Callable[[], object]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    step()
    return time.perf_counter() - started
