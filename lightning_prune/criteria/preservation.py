"""Leaving a model as it was found, and lending it other weights for a while."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.errors import ScoreError
from lightning_prune.masking import HoldZero


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Put back train and eval modes, buffers, gradients, ``requires_grad`` flags and random states on
    leaving.

    Inside, parameters have no gradient, so whatever accumulates there never mixes with the user's.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    before = random_state(model)
    for parameter, *_ in flags:
        parameter.grad = None
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad, gradient in flags:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        for module, name, buffer, value in buffers:
            module._buffers[name] = buffer
            buffer.data.copy_(value)  # .data: a graph that the user holds must not see a new version
        set_random_state(before)


def random_state(model: nn.Module) -> tuple[Any, ...]:
    """State of Python's, numpy's and torch's generators, on the CPU and the model's CUDA devices."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    cuda = [(device, torch.cuda.get_rng_state(device)) for device in devices]
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def set_random_state(state: tuple[Any, ...]) -> None:
    """Put back what `random_state` returned."""
    python, numpy, cpu, cuda = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    for device, device_state in cuda:
        torch.cuda.set_rng_state(device_state, device)


def fit_baseline(model: nn.Module, baseline: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Copies of the baseline's tensors on the model's devices.

    Raises:
        ScoreError: there is none, or names or shapes differ from the model's.
    """
    if baseline is None:
        raise ScoreError(
            "reference='baseline' needs the weights of the dense model: pass baseline={name: tensor}, for "
            "example a deep "
            "copy of model.state_dict() taken before pruning"
        )
    current = dict(model.state_dict(keep_vars=True))
    fitted = {}
    for name, tensor in current.items():
        if not isinstance(tensor, Tensor):
            continue
        if name not in baseline or baseline[name].shape != tensor.shape:
            found = f"shape {list(baseline[name].shape)}" if name in baseline else "nothing"
            raise ScoreError(
                f"baseline: expected {name!r} with shape {list(tensor.shape)}, found {found}; the model "
                "being scored "
                "must still have the dense shapes (mask it, and reconstruct at the end), or use "
                "reference='self'"
            )
        fitted[name] = baseline[name].detach().to(tensor.device, tensor.dtype, copy=True)
    return fitted


@contextmanager
def swapped(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Let the model compute with other parameters and buffers; masks do not act on them meanwhile."""
    originals: list[tuple[dict[str, Any], str, Any]] = []
    holds: list[tuple[dict[int, Any], dict[int, Any]]] = []
    try:
        for prefix, module in model.named_modules(remove_duplicate=False):
            for owner, parameters in ((module._parameters, True), (module._buffers, False)):
                for name, value in owner.items():
                    lent = tensors.get(f"{prefix}.{name}" if prefix else name)
                    if value is None or lent is None:
                        continue
                    originals.append((owner, name, value))
                    owner[name] = nn.Parameter(lent, requires_grad=False) if parameters else lent
            hooks = module._forward_pre_hooks
            kept = {key: hook for key, hook in hooks.items() if not isinstance(hook, HoldZero)}
            if len(kept) < len(hooks):
                holds.append((hooks, dict(hooks)))
                hooks.clear()
                hooks.update(kept)
        yield
    finally:
        for owner, name, value in reversed(originals):
            owner[name] = value
        for hooks, before in reversed(holds):
            hooks.clear()
            hooks.update(before)
