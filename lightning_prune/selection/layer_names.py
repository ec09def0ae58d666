"""Which layers a setting means: by name, by pattern, or by the module itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_prune.errors import PlanError
from lightning_prune.graph import ChannelGraph
from lightning_prune.plan.basis import matches

LayerName = str | nn.Module
ACCEPTED = "the name of a layer or of a module around some ('layer4'), a pattern ('layer4.*'), or the module itself"


def as_names(name: str, given: Any) -> tuple[LayerName, ...]:
    """What a setting of that name lists; one name or module may stand alone."""
    alone = isinstance(given, (str, nn.Module)) or not isinstance(given, Iterable)
    names = (given,) if alone else tuple(given)
    for item in names:
        if not isinstance(item, (str, nn.Module)):
            raise PlanError(f"{name} takes {ACCEPTED}, or several of them; got {item!r}")
    return names


def names_in(name: str, given: LayerName, model: nn.Module | None) -> tuple[str, ...]:
    """A name or pattern as it is; a module as the names of what it holds, each but once, in the model."""
    if isinstance(given, str):
        return (given,)
    kind = type(given).__name__
    if model is None:
        raise PlanError(
            f"{name}: a module ({kind}) is found only in the model: pass select(..., model=model), or its name"
        )
    inside = {id(part) for part in given.modules()}
    found = [path for path, module in model.named_modules() if id(module) in inside]
    if id(given) not in map(id, model.modules()):
        raise PlanError(
            f"{name}: this {kind} is not in the model that is pruned, which is another object or a copy; give its "
            "name, such as 'layer4.0.conv1'"
        )
    outer = [path for path in found if not any(path.startswith(f"{other}.") for other in found)]
    if "" in outer:
        return ("*",)
    # A module that is shared has its layers under the name by which the model reaches them first.
    weights = [path for path, parameter in model.named_parameters() if parameter.dim() > 1]
    own = [path for path in outer if any(weight.startswith(f"{path}.") for weight in weights)]
    return tuple(own or outer)


def check_patterns(name: str, given: Iterable[LayerName], graph: ChannelGraph) -> list[str]:
    """The names and patterns of the setting of that name, unless one matches no layer."""
    layers = [layer.name for group in graph.groups for layer in group.layers]
    patterns = [pattern for item in given for pattern in names_in(name, item, None)]
    for pattern in patterns:
        if not any(matches(pattern, layer) for layer in layers):
            raise PlanError(f"{name}: no layer matches {pattern!r}; layers are {', '.join(layers)}")
    return patterns
