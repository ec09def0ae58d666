"""Weights that torch computes from other tensors: what they are now, without side effects.

Masks of `torch.nn.utils.prune` and the older `weight_norm` and `spectral_norm` are forward pre-hooks. Between two calls
the module holds the result of the last one: a plain attribute, whose shape is out of date once its sources are cut, and
whose autograd history keeps it from being copied. A parametrised weight is computed whenever somebody looks at it, in
train mode perhaps with other numbers each time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def weight_hooks(module: nn.Module) -> dict[str, Any]:
    """{tensor name: the hook that computes it}."""
    return {_name(hook): hook for hook in module._forward_pre_hooks.values() if _is_known(hook)}


def computed(module: nn.Module, hook: Any) -> Tensor:
    """What the hook would set now; no buffer changes."""
    if isinstance(hook, BasePruningMethod):
        return hook.apply_mask(module)
    if isinstance(hook, SpectralNorm):
        return hook.compute_weight(module, do_power_iteration=False)
    return hook.compute_weight(module)


def value_of(module: nn.Module, name: str) -> Any:
    """A module's attribute, detached, None if it has none; looking at a parametrised one changes no buffer."""
    if not is_parametrized(module, name):
        found = getattr(module, name, None)
        return found.detach() if isinstance(found, Tensor) else found
    steps = module.get_submodule(f"parametrizations.{name}")
    modes = [(step, step.training) for step in steps.modules()]
    try:
        steps.eval()
        with torch.no_grad():
            return getattr(module, name)
    finally:
        for step, training in modes:
            step.training = training


def recompute_(model: nn.Module) -> None:
    """Bring what these hooks computed last up to date with its sources, without an autograd history."""
    with torch.no_grad():
        for module in model.modules():
            for name, hook in weight_hooks(module).items():
                setattr(module, name, computed(module, hook))


def update_recurrent_(model: nn.Module) -> None:
    """Make recurrent layers say what their weights are; on a GPU these also have to lie in one piece of memory."""
    for module in model.modules():
        if isinstance(module, nn.RNNCellBase):
            module.input_size = module.weight_ih.shape[1]
        elif isinstance(module, nn.RNNBase):
            module.input_size = cast(Tensor, module.weight_ih_l0).shape[1]
            module.flatten_parameters()


def without_history(model: nn.Module) -> dict[int, Tensor]:
    """{id: detached copy} of the tensors in a model's attributes that torch cannot deep-copy: results of autograd."""
    found: dict[int, Tensor] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) or (
                isinstance(value, (list, tuple, dict)) and value and name not in ("_parameters", "_modules")
            ):
                found |= {id(tensor): tensor.detach().clone() for tensor in _tensors(value) if not tensor.is_leaf}
    return found


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _is_known(hook: Any) -> bool:
    return isinstance(hook, (BasePruningMethod, WeightNorm, SpectralNorm))


def _name(hook: Any) -> str:
    return hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name
