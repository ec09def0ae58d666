"""What compensations share: the layers that read removed channels, and leaving a model as it was on failure."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.criteria.channel_contributions import input_dim, is_computable
from lightning_prune.errors import CompensationError, NoEffectWarning
from lightning_prune.graph import ChannelGraph, on_device
from lightning_prune.model_state.preservation import knows_shapes, random_state, set_random_state
from lightning_prune.plan import Plan
from lightning_prune.reconstruction.masks import masked_entries

Forward = Callable[[nn.Module, Any], Any]
Missing = Literal["refuse", "skip"]


@dataclass(frozen=True, eq=False)
class Reader:
    """A convolution or linear layer that reads removed channels.

    Attributes:
        path: of the module.
        dim: its weight's input dimension (1; 0 in transposed convolutions).
        removed: (entries of that dimension,) whether it reads a channel that goes.
    """

    path: str
    dim: int
    removed: Tensor

    def module(self, model: nn.Module) -> Any:
        """The layer, in the model or in a copy."""
        return model.get_submodule(self.path)


def readers(model: nn.Module, graph: ChannelGraph, plan: Plan) -> list[Reader]:
    """Layers that read removed channels, whose output is a sum over their inputs."""
    found: dict[str, Reader] = {}
    for name, planned in plan.groups.items():
        gone = torch.tensor(planned.removed, dtype=torch.int64)
        for part in graph.group(name).slices if len(gone) else ():
            path, _, attribute = part.tensor.rpartition(".")
            module = model.get_submodule(path)
            if attribute == "weight" and part.layer is None and input_dim(module) == part.dim:
                if path not in found:
                    size = graph.shapes[part.tensor][part.dim]
                    found[path] = Reader(path, part.dim, torch.zeros(size, dtype=torch.bool))
                found[path].removed[part.index[gone].flatten()] = True
    return list(found.values())


def repairable(
    model: nn.Module,
    graph: ChannelGraph,
    plan: Plan,
    missing: Missing,
    unfit: Callable[[Any, Reader], str | None],
) -> list[Reader]:
    """The readers that can be repaired, once everything has been checked.

    Args:
        model: dense.
        graph: its graph.
        plan: what goes.
        missing: ``refuse`` or ``skip`` the others.
        unfit: why a layer cannot be repaired, if so.

    Raises:
        CompensationError: the model is masked already, ``missing`` is unknown, or a reader is to be refused.
        PlanError: the graph or the plan belongs to another model.
    """
    if missing not in ("refuse", "skip"):
        raise CompensationError(f"missing must be 'refuse' or 'skip', got {missing!r}")
    plan.check(graph)
    graph.check(model)
    if knows_shapes(model) or _is_masked(model, graph, plan):
        raise CompensationError(
            "the removed channels are zero already, so there is nothing left to measure; compensate the dense model, "
            "before mask_, with MaskHandle.undo() if need be"
        )
    fit, refused = [], []
    for reader in readers(model, graph, plan):
        module = reader.module(model)
        reason = unfit(module, reader) if is_computable(module) else f"a {type(module).__name__} of its own"
        if reason is None:
            fit.append(reader)
        else:
            refused.append(f"{reader.path} ({reason})")
    if refused and missing == "refuse":
        raise CompensationError(
            f"cannot repair {', '.join(refused)}; missing='skip' leaves such layers as they are and repairs the others"
        )
    return fit


@contextmanager
def repairing(model: nn.Module) -> Iterator[nn.Module]:
    """A frozen dense copy to compare with; no gradients, eval mode, and all or nothing for the model's tensors."""
    dense = copy.deepcopy(model)
    modes = [(module, module.training) for module in model.modules()]
    before = random_state(model)
    model.eval()
    dense.eval()
    try:
        with torch.no_grad():
            yield dense
    except BaseException:
        _restore_(model, dense)
        raise
    finally:
        for module, training in modes:
            module.training = training
        set_random_state(before)


def listed(batches: Iterable[Any], model: nn.Module) -> list[Any]:
    """Batches that can be gone through more than once, on the model's device.

    Raises:
        CompensationError: there is none.
    """
    if isinstance(batches, Tensor):
        raise CompensationError("batches must be an iterable of batches such as a DataLoader, got one tensor")
    found = [on_device(batch, model) for batch in batches]
    if not found:
        raise CompensationError("there is no batch to measure on (a used-up generator?)")
    return found


def unreached(paths: list[str]) -> CompensationError:
    """Layers that run in train mode only, or not on these batches."""
    return CompensationError(
        f"no batch reached {', '.join(paths)}; pass batches that do, or missing='skip' to repair the others"
    )


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that are gone afterwards."""
    placed = list(handles)
    try:
        yield
    finally:
        for handle in placed:
            handle.remove()


def warn_of_nothing() -> None:
    """Say that there was nothing to repair, to the caller of the public function."""
    warnings.warn("no layer that could be repaired reads a removed channel", NoEffectWarning, stacklevel=3)


def _is_masked(model: nn.Module, graph: ChannelGraph, plan: Plan) -> bool:
    """Whether everything that the plan masks is zero already."""
    parameters = dict(model.named_parameters())
    zeros = masked_entries(graph, plan)
    found = [parameters[z.parameter].detach().index_select(z.dim, z.entries.to(parameters[z.parameter].device))
             for z in zeros]  # fmt: skip
    return bool(found) and not any(bool(values.any()) for values in found)


def _restore_(model: nn.Module, dense: nn.Module) -> None:
    pairs = ((model.named_parameters(), dense.named_parameters()), (model.named_buffers(), dense.named_buffers()))
    for mine, theirs in pairs:
        before = dict(theirs)
        for name, tensor in mine:
            tensor.data.copy_(before[name])
