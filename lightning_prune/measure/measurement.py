"""What a model costs, all in one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from lightning_prune.engines import Engine, engine_from
from lightning_prune.errors import PruningError, TraceError
from lightning_prune.graph.model_checks import check_traceable
from lightning_prune.graph.running import map_tensors
from lightning_prune.measure.counting import count_params, flops_by_convention, measure_memory, state_size
from lightning_prune.measure.latency import Latency, measure_latency
from lightning_prune.model_state.preservation import copy_without_values

Shapes = dict[str, torch.Size]


@dataclass(frozen=True, eq=False, repr=False)
class Measurement:
    """Cost of one model on one input.

    Parameters are counted at once; what takes a pass is found out when it is first read, and remembered. FLOPs are
    those of the model as it was measured, whatever became of it, since they are counted on a copy without values.
    A model that looks at values (a detector that counts boxes) is run itself for that; so is every model for
    ``latency``, ``peak_memory_bytes`` and ``size_bytes``: they are of the model as it is then.

    Attributes:
        params: trainable parameters.
        total_params: with frozen ones.
        macs: multiply-accumulates of convolutions and matrix products, per sample.
        flops: per sample, by convention name, see `count_flops`.
        latency: of one forward pass on the whole input, in eval mode, on the engine.
        peak_memory_bytes: largest sum of activations alive at once in that pass.
        size_bytes: of the saved state dict.
    """

    params: int
    total_params: int
    _model: nn.Module
    _inputs: Any
    _repeats: int
    _engine: str | Engine
    _without_values: nn.Module | None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Measurement):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in ("params", "total_params", "flops"))

    def __repr__(self) -> str:
        return f"Measurement(params={self.params}, total_params={self.total_params}, flops={self.flops})"

    @cached_property
    def flops(self) -> dict[str, int]:  # noqa: D102
        if self._without_values is not None:
            try:
                inputs = map_tensors(lambda tensor: tensor.to("meta"), self._inputs)
                return flops_by_convention(self._without_values, inputs)
            except TraceError:  # the model looks at values, or does not run at all
                if _shapes(self._model) != _shapes(self._without_values):
                    raise PruningError(
                        "the model was cut after it was measured, and its FLOPs cannot be counted without values: read "
                        "them before, or measure it again"
                    ) from None
        return flops_by_convention(self._model, self._inputs)

    @property
    def macs(self) -> int:  # noqa: D102
        return self.flops["macs"]

    @cached_property
    def latency(self) -> Latency:  # noqa: D102
        return measure_latency(self._model, self._inputs, engine=self._engine, repeats=self._repeats)

    @cached_property
    def peak_memory_bytes(self) -> int:  # noqa: D102
        return measure_memory(self._model, self._inputs)

    @cached_property
    def size_bytes(self) -> int:  # noqa: D102
        return state_size(self._model)


def measure(model: nn.Module, example_inputs: Any, *, engine: str | Engine = "eager", repeats: int = 10) -> Measurement:
    """Count parameters; everything else is found out when it is read, see `Measurement`.

    Args:
        model: left as it is.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        engine: what ``latency`` is measured on, see `lightning_prune.engines`.
        repeats: passes timed.

    Raises:
        EngineError: an unknown engine; when ``latency`` is read: it is not installed or cannot run the model.
        TraceError: the model is scripted; when ``flops`` or ``macs`` is read: it does not run on the inputs.
        PruningError: when ``latency`` is read: no repeats, or a model on the meta device; when ``flops`` is read: a
            model that looks at values has lost channels since.

    Example:
        >>> import torch
        >>> found = measure(nn.Linear(4, 2), torch.zeros(1, 4))
        >>> found.macs, found.peak_memory_bytes, found.latency.median > 0
        (8, 24, True)
    """
    check_traceable(model)
    engine = engine_from(engine)
    params, total = count_params(model), count_params(model, trainable=False)
    try:
        without_values = copy_without_values(model)
    except PruningError:  # cannot be copied, so counted at once
        found = Measurement(params, total, model, example_inputs, repeats, engine, None)
        _ = found.flops
        return found
    return Measurement(params, total, model, example_inputs, repeats, engine, without_values)


def _shapes(model: nn.Module) -> Shapes:
    return {name: tensor.shape for name, tensor in (*model.named_parameters(), *model.named_buffers())}
