"""Example inputs as people hand them over: a tensor, positional arguments, or keyword arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def as_args(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(positional, keyword) arguments of a forward call.

    A tuple is spread over the positional arguments, a dict with string keys over the keyword arguments; anything
    else, a list of images included, is the only argument.
    """
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    if isinstance(example_inputs, Mapping) and all(isinstance(key, str) for key in example_inputs):
        return (), dict(example_inputs)
    return (example_inputs,), {}


def call_model(model: nn.Module, example_inputs: Any) -> Any:
    """The model's output on example inputs."""
    args, kwargs = as_args(example_inputs)
    return model(*args, **kwargs)


def on_device(batch: Any, model: nn.Module) -> Any:
    """A batch with its tensors where the model's are, in the containers that loaders make; others as they are."""
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    return _moved(batch, device)


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_moved(value, device) for value in batch))
    if type(batch) in (list, tuple):
        return type(batch)(_moved(value, device) for value in batch)
    return batch
