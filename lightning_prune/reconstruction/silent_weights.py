"""Weights that are all zero until they are trained: what they multiply is in no result that could be compared."""

from __future__ import annotations

import torch
from torch import nn

from lightning_prune.graph.entry_points import EntryPoint
from lightning_prune.model_state.preservation import copy_without_masks
from lightning_prune.reconstruction.lossless import CannotRunError, Side


def awake_copy(model: nn.Module, forward: EntryPoint) -> nn.Module | None:
    """A copy in which they are not (the gamma of a ReZero or attention block, a zero-initialised last convolution).

    None: there are none, or what comes out is not finite with others. Biases hide nothing by being zero.
    """
    silent = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.is_floating_point() and not name.endswith("bias")
        if parameter.numel() and not bool(parameter.any())
    ]
    if not silent:
        return None
    awake, generator = copy_without_masks(model), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in silent:
            parameter = awake.get_parameter(name)
            values = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) + 0.5
            signs = torch.randint(2, parameter.shape, generator=generator) * 2 - 1
            inputs = max(1, parameter[0].numel()) if parameter.dim() else 1
            parameter.copy_(values * signs / inputs**0.5)
    try:
        outputs = Side(awake).outputs(forward, False, None)
    except CannotRunError:
        return None
    return awake if all(bool(tensor.isfinite().all()) for tensor in outputs) else None
