"""What repairs of weights share: which readers can be repaired, and leaving a model as it was on failure."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_prune.criteria.batches import each_batch
from lightning_prune.criteria.channel_contributions import is_computable
from lightning_prune.errors import CompensationError, NoEffectWarning
from lightning_prune.graph import ChannelGraph
from lightning_prune.graph.readers import readers_of
from lightning_prune.model_state.copying import copied
from lightning_prune.model_state.preservation import knows_shapes, random_state, set_random_state
from lightning_prune.model_state.recomputing import weight_hooks
from lightning_prune.plan import Plan
from lightning_prune.reconstruction.masks import masked_entries

Missing = Literal["refuse", "skip"]


def kept_inputs(model: nn.Module, graph: ChannelGraph, plan: Plan) -> dict[str, Tensor]:
    """Per layer that reads removed channels, which inputs of its weight belong to none of them."""
    kept: dict[str, Tensor] = {}
    for name, planned in plan.groups.items():
        gone = list(planned.removed)
        for path, reader in readers_of(model, graph.group(name)).items() if gone else ():
            if path not in kept:
                kept[path] = torch.ones(graph.shapes[reader.weight][reader.dim], dtype=torch.bool)
            kept[path][reader.index[gone].flatten()] = False
    return {path: entries.nonzero().flatten() for path, entries in kept.items()}


def repairable(
    model: nn.Module, graph: ChannelGraph, plan: Plan, missing: Missing, unfit: Callable[[str, Any], str | None]
) -> dict[str, Tensor]:
    """The `kept_inputs` of the layers that can be repaired (``unfit``: why not), once all has been checked."""
    if missing not in ("refuse", "skip"):
        raise CompensationError(f"missing must be 'refuse' or 'skip', got {missing!r}")
    plan.check(graph)
    graph.check(model)
    if knows_shapes(model) or _is_masked(model, graph, plan):
        raise CompensationError(
            "the removed channels are zero already, so there is nothing left to measure; compensate the dense model, "
            "before mask_, with MaskHandle.undo() if need be"
        )
    fit, refused = {}, []
    for path, kept in kept_inputs(model, graph, plan).items():
        module = model.get_submodule(path)
        reason = unfit(path, module) if is_computable(module) else f"a {type(module).__name__} of its own"
        if reason is None and weight_hooks(module):
            reason = "its weight is computed from other parameters"
        if reason is None:
            fit[path] = kept
        else:
            refused.append(f"{path} ({reason})")
    if refused and missing == "refuse":
        raise CompensationError(
            f"cannot repair {', '.join(refused)}; missing='skip' leaves such layers as they are and repairs the others"
        )
    return fit


@contextmanager
def repairing(model: nn.Module) -> Iterator[nn.Module]:
    """A frozen dense copy to compare with; no gradients, eval mode, and all or nothing for the model's tensors."""
    dense = copied(model)
    modes = [(module, module.training) for module in model.modules()]
    before = random_state(model)
    model.eval()
    dense.eval()
    try:
        with torch.no_grad():
            yield dense
    except BaseException:
        kept = dict((*dense.named_parameters(), *dense.named_buffers()))
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            tensor.data.copy_(kept[name])
        raise
    finally:
        for module, training in modes:
            module.training = training
        set_random_state(before)


def measured(model: nn.Module, batches: Iterable[Any]) -> Iterator[Any]:
    """Batches on the model's device."""
    return each_batch(model, batches, CompensationError("there is no batch to measure on (a used-up generator?)"))


def check_reached(paths: Iterable[str], reached: Iterable[str], missing: Missing) -> None:
    """Refuse layers that run in train mode only, or not on these batches."""
    found = set(reached)
    never = [path for path in paths if path not in found]
    if never and missing == "refuse":
        raise CompensationError(
            f"no batch reached {', '.join(never)}; pass batches that do, or missing='skip' to repair the others"
        )


def warn_of_nothing() -> None:
    """Say that there was nothing to repair, to the caller of the public function."""
    warnings.warn("no layer that could be repaired reads a removed channel", NoEffectWarning, stacklevel=3)


def _is_masked(model: nn.Module, graph: ChannelGraph, plan: Plan) -> bool:
    """Whether everything that the plan masks is zero already."""
    zeros = [(model.get_parameter(item.parameter).detach(), item) for item in masked_entries(graph, plan)]
    masked = [parameter.index_select(item.dim, item.entries.to(parameter.device)) for parameter, item in zeros]
    return bool(masked) and not any(bool(entries.any()) for entries in masked)
