"""What a model costs, all in one."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from lightning_prune.measure.counting import count_params, flops_by_convention, measure_memory, state_size
from lightning_prune.measure.latency import Latency, measure_latency


@dataclass(frozen=True)
class Measurement:
    """Cost of one model on one input.

    What takes passes of its own is measured when it is first read, on the model as it is then, and remembered.

    Attributes:
        params: trainable parameters.
        total_params: with frozen ones.
        macs: multiply-accumulates of convolutions and matrix products, per sample.
        flops: per sample, by convention name, see `count_flops`.
        latency: of one forward pass on the whole input, in eval mode; when read.
        peak_memory_bytes: largest sum of activations alive at once in that pass; when read.
        size_bytes: of the saved state dict; when read.
    """

    params: int
    total_params: int
    flops: dict[str, int]
    _model: nn.Module = field(repr=False, compare=False)
    _inputs: Any = field(repr=False, compare=False)
    _repeats: int = field(repr=False, compare=False)

    @property
    def macs(self) -> int:  # noqa: D102
        return self.flops["macs"]

    @cached_property
    def latency(self) -> Latency:  # noqa: D102
        return measure_latency(self._model, self._inputs, repeats=self._repeats)

    @cached_property
    def peak_memory_bytes(self) -> int:  # noqa: D102
        return measure_memory(self._model, self._inputs)

    @cached_property
    def size_bytes(self) -> int:  # noqa: D102
        return state_size(self._model)


def measure(model: nn.Module, example_inputs: Any, *, repeats: int = 10) -> Measurement:
    """Count parameters and FLOPs; latency, memory and size are measured when they are read.

    Args:
        model: left as it is.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        repeats: passes timed.

    Raises:
        TraceError: the model does not run on the inputs.
        PruningError: when ``latency`` is read: no repeats, or a model on the meta device.

    Example:
        >>> import torch
        >>> found = measure(nn.Linear(4, 2), torch.zeros(1, 4))
        >>> found.macs, found.peak_memory_bytes, found.latency.median > 0
        (8, 24, True)
    """
    return Measurement(
        count_params(model),
        count_params(model, trainable=False),
        flops_by_convention(model, example_inputs),
        model,
        example_inputs,
        repeats,
    )
