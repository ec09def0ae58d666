"""Reconstruct: build the physically smaller model that computes exactly what the masked one computes."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_prune.errors import NotReconstructedWarning, ReconstructionError
from lightning_prune.graph import ChannelGraph
from lightning_prune.graph.entry_points import EntryPoint, entry_points
from lightning_prune.model_state.cut_history import history_of, remember_history_
from lightning_prune.model_state.cutting import Cut, Undo, cut_, remember_dense_, rescale_means_, resize_
from lightning_prune.model_state.memory import NewMemory
from lightning_prune.model_state.optimizer_state import change_state_, unwrap
from lightning_prune.model_state.preservation import (
    copy_sharing_tensors,
    copy_without_masks,
    folding,
    knows_shapes,
    own_tensors_,
)
from lightning_prune.plan import Plan
from lightning_prune.reconstruction.holding import Zeros
from lightning_prune.reconstruction.lossless import LosslessReport
from lightning_prune.reconstruction.masks import masked_entries
from lightning_prune.reconstruction.rehearsal import rehearse
from lightning_prune.reconstruction.silent_weights import awake_copy

M = TypeVar("M", bound=nn.Module)


def reconstruct(
    model: M, graph: ChannelGraph, plan: Plan, *, example_inputs: Any = None, also: Sequence[Any] = ()
) -> M:
    r"""Build a smaller copy of a model without the channels that a plan removes; the model itself is untouched.

    Every tensor keeps the entries :math:`\{0..n\} \setminus R`, where :math:`R` unites what all groups remove from
    it. Residual additions keep the union of their members' channels and concatenations keep aligned indices, since
    groups already say which entries go together (Lee et al., Sensors 23(4):2102, 2023). The entries that the plan
    masks are zero in the copy, whether or not `mask_` ran before.

    Args:
        model: the traced model, masked or not.
        graph: from `lightning_prune.trace`.
        plan: which channels to keep.
        example_inputs: if given, the smaller model is compared with the masked one in float64, on them and at another
            batch and image size. Without, nothing runs: code that asks how many channels there are is not found out.
        also: what else to compare on, as for `lightning_prune.trace`.

    Raises:
        PlanError: the plan or the graph does not belong to this model.
        ReconstructionError: the smaller model does not run, or is not equal.

    Example:
        >>> from lightning_prune import L1, LayerRatio, score, trace
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> graph = trace(model, torch.zeros(1, 3, 8, 8))
        >>> plan = LayerRatio(0.5).select(graph, score(model, graph, L1()))
        >>> reconstruct(model, graph, plan)[0]
        Conv2d(3, 4, kernel_size=(3, 3), stride=(1, 1))
    """
    small = _twin(model)
    _check(small, graph, plan)
    entries = [] if example_inputs is None else entry_points(example_inputs, also)
    _reconstruct_(small, graph, plan, [], entries, undoable=bool(entries))
    own_tensors_(small, model)
    return small


def reconstruct_(
    model: nn.Module,
    graph: ChannelGraph,
    plan: Plan,
    *,
    optimizers: Iterable[Optimizer] = (),
    example_inputs: Any = None,
    also: Sequence[Any] = (),
) -> LosslessReport | None:
    """Reconstruct in place: parameters stay the same objects, so optimizers go on; their state is cut along.

    Every tensor keeps its type, device, memory format and ``requires_grad``; gradients and optimizer state lie in
    memory as their weight does, which fused optimizers rely on.

    Remove masks (`MaskHandle.remove`) first. On failure model and optimizers are as they were. If the model's code
    cannot run with fewer channels of some group, which tracing did not find out, only that group keeps its width,
    with its masked channels at zero; a warning and the report name it.

    Args:
        model: the traced model, masked or not.
        graph: from `lightning_prune.trace`.
        plan: which channels to keep.
        optimizers: their state is cut along.
        example_inputs: if given, the result is compared with the masked model in float64, on them and at another
            batch and image size, and the comparison returned. What is lossy by choice (`Plan.lossless`,
            `Group.statistics`) is compared, not refused.
        also: what else to compare on, as for `lightning_prune.trace`.

    Raises:
        PlanError: the plan or the graph does not belong to this model.
        ReconstructionError: masks are still held, the smaller model does not run, or is not equal to the masked
            one.
        OptimizerError: an optimizer keeps something that cannot be cut along, as Adafactor and LBFGS do.

    Example:
        >>> from lightning_prune.graph import trace
        >>> from lightning_prune.plan import GroupPlan
        >>> model, images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)), torch.ones(1, 3, 8, 8)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> graph, plan = trace(model, images), Plan({"0": GroupPlan(4, (0, 3))})
        >>> reconstruct_(model, graph, plan, optimizers=[optimizer], example_inputs=images).passed
        True
        >>> model[2].in_channels
        2
    """
    _check(model, graph, plan)
    entries = [] if example_inputs is None else entry_points(example_inputs, also)
    return _reconstruct_(model, graph, plan, unwrap(optimizers), entries)


def _check(model: nn.Module, graph: ChannelGraph, plan: Plan) -> None:
    """Refuse what cannot be reconstructed, and warn of what was not traced."""
    plan.check(graph)
    check_reconstructible(model, graph)
    if plan:
        graph.warn_of_unreached()


def check_reconstructible(model: nn.Module, graph: ChannelGraph) -> None:
    """Refuse a model of other shapes, and one on which something is registered that knows them."""
    graph.check(model)
    if knows_shapes(model):
        raise ReconstructionError(
            "masks or gradient hooks are registered on the model; they know the old shapes. Call "
            "MaskHandle.remove() first"
        )


def reconstruct_masked(
    masked: M, graph: ChannelGraph, plan: Plan, entries: Sequence[EntryPoint]
) -> tuple[M, LosslessReport]:
    """Build the smaller model of one that `mask_` has masked, and compare exactly these two."""
    small = _twin(masked)
    report = _reconstruct_(small, graph, plan, [], entries, masked)
    own_tensors_(small, masked)
    assert report is not None
    return small, report


def _reconstruct_(
    model: nn.Module,
    graph: ChannelGraph,
    plan: Plan,
    optimizers: list[Optimizer],
    entries: Sequence[EntryPoint],
    masked: nn.Module | None = None,
    *,
    undoable: bool = True,
) -> LosslessReport | None:
    """Leave out the groups at fault, if it does not work with all.

    undoable: False for a copy that a failure leaves to nobody, and that is not run, so that no group can be at fault.
    """
    before = _shapes(model)
    left: dict[str, str] = {}
    try:
        report = _attempt(model, graph, plan, optimizers, entries, masked, undoable=undoable)
    except ReconstructionError:
        if not undoable:
            raise
        left = _at_fault(model, graph, plan, entries)
        if not left:
            raise
        report = _attempt(model, graph, plan, optimizers, entries, masked, left)
    after = _shapes(model)
    remember_dense_(model, {name: shape for name, shape in before.items() if after[name] != shape})
    for name, reason in left.items():
        warnings.warn(
            f"group {name!r} keeps its {graph.group(name).size} channels, the masked ones at zero: {reason}",
            NotReconstructedWarning,
            stacklevel=3,
        )
    return None if report is None else replace(report, left=left)


def _attempt(
    model: nn.Module,
    graph: ChannelGraph,
    plan: Plan,
    optimizers: list[Optimizer],
    entries: Sequence[EntryPoint],
    masked: nn.Module | None = None,
    left: Collection[str] = (),
    *,
    undoable: bool = True,
    awake: bool = False,
) -> LosslessReport | None:
    """Mask, cut all groups but those that are ``left``, and compare; on failure everything is put back.

    awake: weights that were all zero are not, see `silent_weights`.
    """
    undo = Undo(model, optimizers) if undoable else None
    removed = {name: gone for name, gone in plan.channels_removed.items() if name not in left}
    try:
        found = graph.cuts(removed)
        if masked is None:
            zeros = masked_entries(graph, plan) if entries else _surviving(graph, plan, removed, found)
            _zero(model, zeros, optimizers)
            if entries:
                masked = _twin(model)
        history = history_of(model)
        cut_(model, found, optimizers)
        resize_(model, graph.new_sizes(removed))
        precise = rescale_means_(model, graph.mean_rescalings(removed), optimizers)
        lossless = plan.lossless and not _lossy(graph, plan)
        report = None if masked is None else rehearse(masked, model, entries, lossless=lossless, precise=precise)
        copy = awake_copy(masked, entries[0]) if masked is not None and lossless and not awake else None
        if copy is not None:
            _attempt(copy, graph, plan, [], entries, left=left, undoable=False, awake=True)
        remember_history_(model, history and history.after(found, graph.shapes))
        return report
    except BaseException:
        if undo is not None:
            undo()
        raise


def _twin(model: M) -> M:
    """A copy to be cut, or beside which to cut: that copies most tensors. But a fold would write to the others."""
    return copy_without_masks(model) if folding(model) else copy_sharing_tensors(model)


@torch.inference_mode(False)
def _zero(model: nn.Module, zeros: list[Zeros], optimizers: list[Optimizer]) -> None:
    """Zero entries in new tensors, so that what shares the old ones is not changed."""
    parameters, memory = dict(model.named_parameters()), NewMemory()
    for item in zeros:
        parameter = parameters[item.parameter]
        memory.change_(parameter, item.cleared, item.dim, item.entries)
        change_state_(optimizers, parameter, parameter.shape, item.cleared)


def _at_fault(model: nn.Module, graph: ChannelGraph, plan: Plan, entries: Sequence[EntryPoint]) -> dict[str, str]:
    """{group: why} of those that cannot be cut although the plan asks for it, by halving."""

    def failure(names: list[str]) -> str | None:
        try:
            others = [name for name in plan.groups if name not in names]
            _attempt(copy_without_masks(model), graph, plan, [], entries, left=others)
        except ReconstructionError as error:
            return str(error)
        return None

    def search(names: list[str]) -> dict[str, str]:
        reason = failure(names)
        if reason is None:
            return {}
        if len(names) == 1:
            return {names[0]: reason}
        middle = len(names) // 2
        return search(names[:middle]) | search(names[middle:]) or dict.fromkeys(names, reason)

    names = [name for name, group in plan.groups.items() if group.removed]
    return {} if failure([]) else search(names)


def _surviving(graph: ChannelGraph, plan: Plan, removed: Collection[str], found: list[Cut]) -> list[Zeros]:
    """Masked entries that the cuts leave: zeroing what goes anyway would only copy tensors."""
    keeps = {(cut.tensor, cut.dim): cut.keep for cut in found}
    left = []
    for item in masked_entries(graph, plan, cut=removed):
        keep = keeps.get((item.parameter, item.dim))
        entries = item.entries if keep is None else item.entries[torch.isin(item.entries, keep)]
        if len(entries):
            left.append(replace(item, entries=entries))
    return left


def cuts(graph: ChannelGraph, plan: Plan) -> list[Cut]:
    """What survives of every tensor dimension that loses entries."""
    return graph.cuts(plan.channels_removed)


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    """{name: shape} of all parameters and buffers, under every name that shared ones have."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: tensor.shape for name, tensor in named}


def _lossy(graph: ChannelGraph, plan: Plan) -> bool:
    """Whether channels go that a statistic still counts, which `lightning_prune.trace` was told to allow."""
    return any(graph.group(name).statistics and group.removed for name, group in plan.groups.items())
