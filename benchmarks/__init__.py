"""Scripts that measure what the README and the closing notes claim."""

import time
from collections.abc import Callable


def seconds(step: Callable[[], object]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    step()
    return time.perf_counter() - started
