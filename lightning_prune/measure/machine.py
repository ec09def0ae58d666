"""What this machine could do at best, on the CPU: the limits that the times of layers are held against."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Machine:
    """What the CPU does at best, with the threads that torch has.

    Attributes:
        flops: floating-point operations per second, of a large matrix product.
        bandwidth: bytes per second, read and written, of copying more than the caches hold.
        call: seconds that the call of a layer takes which computes nothing to speak of: a rectifier on one number.
        product_call: the same for a layer with weights: a 1x1 convolution on one pixel.
        threads: of the CPU.
    """

    flops: float
    bandwidth: float
    call: float
    product_call: float
    threads: int

    @property
    def balance(self) -> float:
        """FLOPs per byte below which memory, not arithmetic, sets the pace."""
        return self.flops / self.bandwidth


def measure_machine(*, repeats: int = 7) -> Machine:
    """Measure what this CPU does at best: a product of 1,024 x 1,024 matrices, and a copy of 128 MiB, in float32.

    The fastest of the repeats counts for the limits, the median for the calls. Write-allocation is not counted, so the
    bandwidth is that of useful bytes.

    Args:
        repeats: of each.

    Example:
        >>> measure_machine(repeats=1).balance > 0
        True
    """
    size, count = 1024, 2**25
    left, right = torch.ones(size, size), torch.ones(size, size)
    product = torch.empty(size, size)
    source, target = torch.zeros(count), torch.empty(count)
    pixel, scalar = torch.zeros(1, 8, 1, 1), torch.zeros(1)
    convolution, rectifier = nn.Conv2d(8, 8, 1).eval(), nn.ReLU()
    with torch.no_grad():
        return Machine(
            flops=2 * size**3 / min(_seconds(lambda: torch.mm(left, right, out=product), repeats + 1)),
            bandwidth=2 * 4 * count / min(_seconds(lambda: target.copy_(source), repeats + 1)),
            call=median(_seconds(lambda: rectifier(scalar), 50 * repeats)),
            product_call=median(_seconds(lambda: convolution(pixel), 50 * repeats)),
            threads=torch.get_num_threads(),
        )


def _seconds(run: Callable[[], Any], times: int) -> list[float]:
    clock = [time.perf_counter()]
    for _ in range(times):
        run()
        clock.append(time.perf_counter())
    return [after - before for before, after in pairwise(clock)]
