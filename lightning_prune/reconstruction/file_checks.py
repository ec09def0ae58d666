"""Whether a pruned file's tensors and sizes are what its own plan says."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_prune.errors import CheckpointError, PruningError
from lightning_prune.model_state.code_sizes import SIZES, following, own_class
from lightning_prune.plan import Plan


def check_plan(
    plan: Plan, state: Mapping[str, Any], modules: Mapping[str, nn.Module], own: Mapping[str, Any], source: str
) -> None:
    """Refuse weights that have other channels than the plan keeps, or than the rest of their layer.

    ``own``: the tensors of the dense model. A layer that makes channels of several groups, or several numbers of each,
    is beyond this; the digest covers it.

    Raises:
        CheckpointError: the first layer that differs is named.
    """
    layers = Counter(layer for group in plan.groups.values() for layer in group.layers)
    for name, group in plan.groups.items():
        for layer in group.layers:
            saved, was = state.get(f"{layer}.weight"), own.get(f"{layer}.weight")
            module = modules.get(layer)
            if layers[layer] > 1 or not isinstance(saved, Tensor) or not isinstance(was, Tensor):
                continue
            if not isinstance(module, (_ConvNd, nn.Linear)) or isinstance(module, _ConvTransposeNd):
                continue
            if was.shape[0] == group.size and saved.shape[0] not in (len(group.keep), group.size):
                raise CheckpointError(
                    f"{source} is damaged: {layer!r} has {saved.shape[0]} channels in it, and its plan keeps "
                    f"{len(group.keep)} of {group.size} in group {name!r}"
                )
    for path, module in modules.items():
        if not isinstance(module, (_ConvNd, nn.Linear, _NormBase)) or isinstance(module, _ConvTransposeNd):
            continue
        sides = {name: state.get(f"{path}.{name}") for name in ("weight", "bias", "running_mean", "running_var")}
        lengths = {name: len(value) for name, value in sides.items() if isinstance(value, Tensor) and value.dim()}
        if len(set(lengths.values())) > 1:
            raise CheckpointError(f"{source} is damaged: the tensors of {path!r} differ in length: {lengths}")


def check_sizes(modules: Mapping[str, nn.Module], sizes: Mapping[str, Mapping[str, Any]], source: str) -> None:
    """Refuse size attributes that the modules do not have, sizes that stand nowhere in their code, and no sizes.

    Raises:
        CheckpointError: the first one is named.
    """
    for path, values in sizes.items():
        for name, value in values.items():
            if not _is_size(value):
                raise CheckpointError(f"{source} is damaged: {value!r} is no size for {name!r} of {path!r}")
            if name == SIZES and path in modules:
                try:
                    following(own_class(modules[path]), frozenset(map(str, value)))
                except PruningError as error:
                    raise CheckpointError(f"{source} belongs to another model: {path!r}: {error}") from error
            elif not isinstance(getattr(modules.get(path), name, None), type(value)):
                raise CheckpointError(
                    f"{source} belongs to another model: {path!r} has no size {name!r} in the dense one"
                )


def _is_size(value: Any) -> bool:
    """An integer, several of them, perhaps by the place in the code where they stand, or an eps."""
    if isinstance(value, float):
        return 0 < value < math.inf
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else (value,)
    return all(isinstance(item, int) and not isinstance(item, bool) and abs(item) < 2**31 for item in items)
