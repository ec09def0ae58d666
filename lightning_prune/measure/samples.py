"""How many samples example inputs hold, and the same inputs with more or fewer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map


def samples_in(example_inputs: Any) -> int:
    """How many samples a forward pass on these inputs takes; 0 if nothing tells."""
    if isinstance(example_inputs, Tensor):
        return example_inputs.shape[0] if example_inputs.dim() else 0
    if isinstance(example_inputs, list) and any(isinstance(leaf, Tensor) for leaf in tree_leaves(example_inputs)):
        return len(example_inputs)
    if isinstance(example_inputs, Mapping):
        example_inputs = tuple(example_inputs.values())
    parts = example_inputs if isinstance(example_inputs, tuple) else ()
    return next((count for count in map(samples_in, parts) if count), 0)


def with_samples(example_inputs: Any, samples: int) -> Any:
    """The same inputs with another number of samples, repeated or left out; what is no batch stays as it is.

    Example:
        >>> with_samples((torch.zeros(2, 3), 0.5), 5)[0].shape
        torch.Size([5, 3])
    """
    before = samples_in(example_inputs)

    def resized(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() and len(value) == before:
            return value[torch.arange(samples, device=value.device) % before]
        if isinstance(value, list) and len(value) == before:
            return [value[number % before] for number in range(samples)]
        return value

    return tree_map(resized, example_inputs, is_leaf=lambda value: isinstance(value, list))
