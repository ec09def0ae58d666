"""Example inputs as people hand them over: a tensor, positional arguments, or keyword arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


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
