"""Weights that are computed from other tensors at every call: what they are, and what frees them.

Masks of `torch.nn.utils.prune`, weight norm and spectral norm, old and new, any other parametrisation, fake quantizers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.weight_norm import WeightNorm

from lightning_prune.graph.groups import Group
from lightning_prune.model_state.recomputing import computed, value_of, weight_hooks

PARAMETRIZATIONS = ".parametrizations."
NAMES = {"_WeightNorm": "weight norm", "_SpectralNorm": "spectral norm", "_Orthogonal": "orthogonal weights"}
QUANTIZED, FLOAT = "quantized", "prune the float model"
LACKS = (
    ((nn.RNNBase, nn.RNNCellBase), "its hidden size stays"),
    ((nn.Embedding, nn.EmbeddingBag), "its vectors are picked by number"),
)


class ComputedWeight(NamedTuple):
    """One such tensor: the module's path, the attribute, how it is computed, what makes a plain parameter of it."""

    module: str
    attribute: str
    kind: str
    way_out: str


def owner(tensor: str) -> str:
    """Path of the module that a parameter or buffer belongs to; sources of a parametrised weight are the layer's."""
    before, found, _ = f".{tensor}".partition(PARAMETRIZATIONS)
    return before[1:] if found else tensor.rpartition(".")[0]


def source_of(tensor: str) -> str | None:
    """The attribute of its owner that is computed from this tensor, if its name says so."""
    _, found, inside = f".{tensor}".partition(PARAMETRIZATIONS)
    if found:
        return inside.partition(".")[0]
    name = tensor.rpartition(".")[2]
    return next((name.removesuffix(end) for end in ("_orig", "_v", "_g") if name.endswith(end)), None)


def effective_weight(model: nn.Module, tensor: str) -> Tensor:
    """What a layer computes with where a parameter holds its weight: the parameter, or what is computed from it."""
    parameter = model.get_parameter(tensor).detach()
    module, attribute = model.get_submodule(owner(tensor)), source_of(tensor)
    if attribute is None:
        return parameter
    with torch.no_grad():
        if (hook := weight_hooks(module).get(attribute)) is not None:
            found = computed(module, hook)
        elif is_parametrized(module, attribute):
            found = value_of(module, attribute)
        else:
            return parameter
    return found if found.shape == parameter.shape else parameter


def follows_elementwise(model: nn.Module, tensor: str) -> bool:
    """Whether a layer's weight is this parameter, or a mask of torch times it: gradients and factors carry over."""
    module, attribute = model.get_submodule(owner(tensor)), source_of(tensor)
    hook = weight_hooks(module).get(attribute or "")
    return isinstance(hook, BasePruningMethod) or (hook is None and not is_parametrized(module, attribute))


def is_mask(tensor: str, names: Container[str]) -> bool:
    """Whether a buffer is a mask of `torch.nn.utils.prune`. names: of all tensors."""
    return tensor.endswith("_mask") and f"{tensor.removesuffix('_mask')}_orig" in names


def kernels(model: nn.Module) -> set[int]:
    """Ids of all tensors that have the layout of their convolution's weight: positions in them never go."""
    found: set[int] = set()
    for module in model.modules():
        if isinstance(module, _ConvNd):
            own = list(module.parameters() if is_parametrized(module) else module._parameters.values())
            rank = len(module.kernel_size) + 2
            found.update(id(t) for t in (*own, *module._buffers.values()) if t is not None and t.dim() == rank)
    return found


def twins(model: nn.Module) -> dict[int, Tensor]:
    """{id of a norm's shift or variance: its scale or mean}, where one norm alone has all of them."""
    tensors = [t for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    uses = Counter(map(id, tensors))
    found: dict[int, Tensor] = {}
    for norm in (module for module in model.modules() if isinstance(module, _NormBase)):
        for own, names in ((norm._parameters, ("weight", "bias")), (norm._buffers, ("running_mean", "running_var"))):
            first, second = (own.get(name) for name in names)
            if first is None or second is None or first.dim() != 1 or first.shape != second.shape:
                continue
            if uses[id(first)] == uses[id(second)] == 1:
                found[id(second)] = first
    return found


def computed_weights(model: nn.Module) -> list[ComputedWeight]:
    """All that a model has."""
    found, quantizing = [], set[str]()
    for path, module in model.named_modules():
        if is_parametrized(module):
            for name, steps in module.parametrizations.items():
                kind = ", ".join(NAMES.get(type(step).__name__, type(step).__name__) for step in steps)
                call = f"torch.nn.utils.parametrize.remove_parametrizations(module, {name!r})"
                found.append(ComputedWeight(path, name, kind, f"call {call} first"))
        for name, hook in weight_hooks(module).items():
            found.append(ComputedWeight(path, name, *_of_hook(name, hook)))
        parent, _, name = path.rpartition(".")
        bases = {cls.__name__ for cls in type(module).__mro__}
        if parent in quantizing:
            quantizing.add(path)
        elif "FakeQuantizeBase" in bases:
            quantizing.add(path)
            found.append(ComputedWeight(parent, name, "fake quantization", f"{FLOAT} before prepare_qat"))
        elif "ObserverBase" in bases:
            found.append(ComputedWeight(parent, name, "observers of quantization", f"{FLOAT} before it is prepared"))
        elif type(module).__module__.startswith("torch.ao.nn") and ".quantized" in type(module).__module__:
            quantizing.add(path)
            found.append(ComputedWeight(path, "", QUANTIZED, f"{FLOAT} before it is quantized"))
    return found


def _of_hook(name: str, hook: object) -> tuple[str, str]:
    if isinstance(hook, BasePruningMethod):
        return "masks of torch.nn.utils.prune", f"call torch.nn.utils.prune.remove(module, {name!r}) first"
    norm = "weight" if isinstance(hook, WeightNorm) else "spectral"
    return f"{norm} norm", f"call torch.nn.utils.remove_{norm}_norm(module, {name!r}) first"


def notes(model: nn.Module, groups: Sequence[Group], weights: Sequence[ComputedWeight]) -> list[str]:
    """What frees the layers whose computed weights hold channels back; what else there is, if no channel can go."""
    held = [group.reason for group in groups if group.reason is not None]
    seen = {layer.name for group in groups for layer in group.layers}
    paths: dict[tuple[str, str], dict[str, None]] = {}
    for weight in weights:
        named = (f"'{weight.module}'", f"'{weight.module}.") if weight.module else ("'parametrizations.",)
        layer = isinstance(model.get_submodule(weight.module), (_ConvNd, nn.Linear)) or weight.kind == QUANTIZED
        vanished = layer and (weight.module or weight.attribute) not in seen
        if vanished or any(name in reason for reason in held for name in named):
            paths.setdefault((weight.kind, weight.way_out), {})[weight.module or "the model"] = None
    told = [
        f"{', '.join(of)} ({kind}) hold channels back; to free them, {way_out}" for (kind, way_out), of in paths.items()
    ]
    return told if any(group.prunable for group in groups) else [*_without_channels(model, groups), *told]


def _without_channels(model: nn.Module, groups: Sequence[Group]) -> list[str]:
    """The modules that make none, and why."""
    seen = {owner(part.tensor) for group in groups for part in group.slices if part.masked}
    found = [
        f"{path or 'the model'} ({type(module).__name__}: {_lacks(module)})"
        for path, module in model.named_modules()
        if not {path, owner(f"{path}.")} & seen and any(True for _ in module.parameters(recurse=False))
    ]
    if not found:
        return [] if groups else ["the model has no parameters"]
    more = f" and {len(found) - 12} more" if len(found) > 12 else ""
    return [f"no channels of their own: {', '.join(found[:12])}{more}"]


def _lacks(module: nn.Module) -> str:
    known = next((what for kinds, what in LACKS if isinstance(module, kinds)), None)
    if known is not None:
        return known
    if isinstance(module, (_ConvNd, nn.Linear)):
        one = getattr(module, "out_channels", getattr(module, "out_features", 0)) == 1
        return "it makes a single channel" if one else "it did not run, or its weight is computed from other tensors"
    if "norm" in type(module).__name__.lower():
        return "it normalises what others make"
    return "its parameters are no filters"
