"""Leaving a model as it was found, also on failure; taking away for a while, or for a copy, what holds masks."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.model_state.copying import copied
from lightning_prune.model_state.recomputing import update_recurrent_

M = TypeVar("M", bound=nn.Module)
Places = list[tuple[dict[str, Any], dict[str, Any]]]


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Put back train and eval modes, buffers, gradients, ``requires_grad`` flags and random states on leaving.

    A submodule or parameter that the model's code replaced by another comes back too; where modules fold weights when
    the mode changes, so do the weights and what these modules remember.

    Inside, parameters have no gradient, so whatever accumulates there never mixes with the user's.
    """
    modules = list(model.modules())
    modes = [(module, module.training) for module in modules]
    found = {id(p): p for module in modules for p in module._parameters.values() if p is not None}
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in found.values()]
    buffers = [
        (own, name, buffer, buffer.detach().clone())
        for own in (module._buffers for module in modules)
        for name, buffer in own.items()
        if buffer is not None
    ]
    places = _places(modules)
    folds = _folding(modules)
    folded = [(own, dict(own)) for module in folds for own in (vars(module), module._modules, module._parameters)]
    weights = [(p, p.data, p.detach().clone()) for p in model.parameters()] if folds else []
    before = random_state(model)
    for parameter, *_ in flags:
        parameter.grad = None
    try:
        yield
    finally:
        put_back(places)
        for own, items in folded:
            own.clear()
            own.update(items)
        for parameter, data, value in weights:
            parameter.data = data.copy_(value)
        for module, training in modes:
            module.training = training
        for parameter, requires_grad, gradient in flags:
            if parameter.requires_grad != requires_grad:  # inference tensors refuse to be told what they are
                parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        for own, name, buffer, value in buffers:
            own[name] = buffer
            buffer.data.copy_(value)  # .data: a graph that the user holds must not see a new version
        set_random_state(before)


def folding(model: nn.Module) -> list[nn.Module]:
    """Modules that do more than set their flag when they change between train and eval mode."""
    return _folding(model.modules())


def _folding(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return [m for m in modules if type(m).train is not nn.Module.train or type(m).eval is not nn.Module.eval]


def places_of(model: nn.Module) -> Places:
    """What stands where in a model, for `put_back`."""
    return _places(model.modules())


def _places(modules: Iterable[nn.Module]) -> Places:
    owns = (own for module in modules for own in (module._modules, module._parameters, module._buffers))
    return [(own, dict(own)) for own in owns if own]


def put_back(places: Places) -> None:
    """Put submodules, parameters and buffers back where they stood; what stands where nothing did is left."""
    for own, before in places:
        if any(own.get(name) is not item for name, item in before.items()):
            merged = {**before, **{name: item for name, item in own.items() if before.get(name) is None}}
            own.clear()
            own.update(merged)


def generators_of(model: nn.Module) -> list[torch.Generator]:
    """Those that modules keep in their attributes."""
    attributes = (value for module in model.modules() for value in vars(module).values())
    plain = (dict, OrderedDict, set, bool, int, float, str, tuple, type(None))  # most; asking torch takes longer
    return [value for value in attributes if type(value) not in plain and isinstance(value, torch.Generator)]


def random_state(model: nn.Module, generators: Sequence[torch.Generator] | None = None) -> tuple[Any, ...]:
    """State of Python's, numpy's and torch's generators, on the CPU and the model's CUDA devices, and of its own."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    cuda = [(device, torch.cuda.get_rng_state(device)) for device in devices]
    own = [(one, one.get_state()) for one in (generators_of(model) if generators is None else generators)]
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda, own


def set_random_state(state: tuple[Any, ...]) -> None:
    """Put back what `random_state` returned."""
    python, numpy, cpu, cuda, own = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    for device, device_state in cuda:
        torch.cuda.set_rng_state(device_state, device)
    for generator, generator_state in own:
        generator.set_state(generator_state)


@contextmanager
def without_masks(model: nn.Module) -> Iterator[None]:
    """Take away the hooks that hold masked entries at zero (`HoldZero`) for a while."""
    hooks = [(module._forward_pre_hooks, dict(module._forward_pre_hooks)) for module in model.modules()]
    for registered, before in hooks:
        for key, hook in before.items():
            if getattr(hook, "holds_masks", False):
                del registered[key]
    try:
        yield
    finally:
        for registered, before in hooks:
            registered.clear()
            registered.update(before)


def _tensors_of(model: nn.Module) -> tuple[list[nn.Parameter], list[torch.Tensor]]:
    """Parameters and buffers, each once: what `nn.Module` lists with all their names takes four times as long."""
    modules = list(model.modules())
    parameters = {id(p): p for module in modules for p in module._parameters.values() if p is not None}
    buffers = {id(b): b for module in modules for b in module._buffers.values() if b is not None}
    return list(parameters.values()), list(buffers.values())


def copy_without_masks(model: M, replaced: Mapping[int, Any] | None = None) -> M:
    """A deep copy whose masked entries may change again. replaced: by an object's id, what stands in its place."""
    with without_masks(model):
        return copied(model, replaced)


@torch.inference_mode(False)
def copy_without_values(model: M) -> M:
    """A copy without masks on the meta device: its parameters and buffers have shapes, but no values."""
    parameters, buffers = _tensors_of(model)
    twins: dict[int, Any] = {id(b): _without_values(b) for b in buffers}
    twins |= {id(p): nn.Parameter(_without_values(p), requires_grad=False) for p in parameters}
    return copy_without_masks(model, twins)


def _without_values(tensor: Tensor) -> Tensor:
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
        return tensor.detach().to("meta")
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


@torch.inference_mode(False)
def copy_sharing_tensors(model: M) -> M:
    """A copy without masks whose parameters and buffers are new objects on the old memory; see `own_tensors_`."""
    parameters, buffers = _tensors_of(model)
    twins: dict[int, Any] = {id(b): b.detach() for b in buffers if type(b) is torch.Tensor}
    for parameter in parameters:
        if type(parameter) is nn.Parameter and not parameter.is_inference():
            twins[id(parameter)] = twin = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
            if hasattr(parameter, "grad_dtype"):  # of torch 2.10 and newer
                twin.grad_dtype = parameter.grad_dtype
            twin.grad = parameter.grad
    return copy_without_masks(model, twins)


@torch.inference_mode(False)
def own_tensors_(twin: nn.Module, model: nn.Module) -> None:
    """Give a copy memory of its own for every tensor, or gradient, that it still shares with the model."""
    tensors = [tensor for kind in _tensors_of(model) for tensor in kind]
    gradients = (tensor.grad for tensor in tensors if tensor.grad is not None)
    shared = {tensor.untyped_storage()._cdata for tensor in (*tensors, *gradients)}
    for tensor in (tensor for kind in _tensors_of(twin) for tensor in kind):
        if tensor.untyped_storage()._cdata in shared:
            tensor.data = tensor.data.clone()
        if tensor.grad is not None and tensor.grad.untyped_storage()._cdata in shared:
            tensor.grad = tensor.grad.clone()
    update_recurrent_(twin)


def knows_shapes(model: nn.Module) -> bool:
    """Whether masks or other gradient hooks are registered that would break if parameters changed their shape.

    The masks of a copy, such as an average that the model keeps of itself, let go of what is cut.
    """
    return any(parameter._backward_hooks for parameter in model.parameters()) or any(
        getattr(hook, "holds_masks", False) and not getattr(hook, "lets_go", False)
        for module in model.modules()
        for hook in module._forward_pre_hooks.values()
    )
