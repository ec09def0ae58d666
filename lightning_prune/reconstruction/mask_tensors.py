"""Masks as plain tensors: a plan written as them, and a plan read from somebody's masks or zero filters."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_prune.errors import PlanError, check_choice
from lightning_prune.graph import ChannelGraph, Group, Layer, Slice
from lightning_prune.graph.computed_weights import effective_weight
from lightning_prune.graph.describe import ranges
from lightning_prune.plan import Basis, GroupPlan, Plan
from lightning_prune.plan.group_plan import numbers_of
from lightning_prune.reconstruction.masks import masked_entries

Constants = Literal["refuse", "keep", "remove"]
Together = Literal["joint", "union"]
LIST = 48  # characters of a list of numbers in a message


def masks_of(graph: ChannelGraph, plan: Plan) -> dict[str, Tensor]:
    """The masks of a plan as plain tensors, which ``torch.save`` writes and others read.

    Args:
        graph: from `lightning_prune.trace`.
        plan: which channels to keep.

    Returns:
        {parameter name: bool tensor of its shape, False where `mask_` holds it at zero}, of all parameters of which
        some entry is masked.

    Raises:
        PlanError: the graph cannot carry out this plan.

    Example:
        >>> import lightning_prune as lp
        >>> model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> graph, plan = lp.trace(model, torch.zeros(1, 1)), Plan({"0": GroupPlan(2, (1,))})
        >>> masks = masks_of(graph, plan)
        >>> masks["0.weight"].tolist(), masks["0.bias"].tolist()
        ([[False], [True]], [False, True])
        >>> plan_from_masks(graph, masks).groups["0"].keep
        (1,)
    """
    plan.check(graph)
    masks: dict[str, Tensor] = {}
    for item in masked_entries(graph, plan):
        if item.parameter not in masks:
            masks[item.parameter] = torch.ones(graph.shapes[item.parameter], dtype=torch.bool)
        masks[item.parameter].index_fill_(item.dim, item.entries, False)
    return masks


def plan_from_masks(
    graph: ChannelGraph, masks: Mapping[str, Tensor], *, coupling: Together = "joint", batch_norm: bool = True
) -> Plan:
    """The plan that removes the channels whose filters are masked: masks of one's own, or of `torch.nn.utils.prune`.

    A channel goes if all weights of its filter are masked; its bias and batch norm go with it, unless the masks say
    that they stay. What a plan cannot do exactly is refused: single weights, a part of what goes together.

    Args:
        graph: from `lightning_prune.trace`.
        masks: {parameter name: 0 and 1, or False and True, in its shape; 0 is masked}. Names may end in ``_mask``
            (``conv1.weight_mask``), as in a state dict of torch's pruning, which is taken whole as well.
        coupling: ``joint``: layers that go together must be masked alike; ``union``: each has its own masks, and what
            any of them keeps survives.
        batch_norm: False: the batch norms are not masked, which is lossy.

    Raises:
        PlanError: masks of another model, or masks that no plan can carry out; the first one is named.

    Example:
        >>> import lightning_prune as lp
        >>> from torch.nn.utils import prune
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> graph = lp.trace(model, torch.zeros(1, 2))
        >>> _ = prune.ln_structured(model[0], "weight", amount=1, n=1, dim=0)
        >>> len(plan_from_masks(graph, model.state_dict()).groups["0"].keep)
        2
    """
    zero = {name: mask == 0 for name, mask in _named(graph, masks).items()}
    plan = _plan(graph, zero, coupling, batch_norm, "refuse", strict=True)
    allowed = {name: torch.zeros_like(mask) for name, mask in zero.items()}
    for item in masked_entries(graph, plan):
        if item.parameter in allowed:
            allowed[item.parameter].index_fill_(item.dim, item.entries, True)
    for name, group in plan.groups.items():
        gone = torch.tensor(group.removed, dtype=torch.int64)
        for part in graph.group(name).slices:
            if part.tensor in allowed:
                allowed[part.tensor].index_fill_(part.dim, part.index[gone].flatten(), True)
    for name, mask in zero.items():
        single = (mask & ~allowed[name]).nonzero()
        if len(single):
            raise PlanError(
                f"the masks also zero {len(single):,} single weights of {name!r} (the first at {single[0].tolist()}), "
                "which are no whole filters: a plan removes channels. Leave them out of the masks"
            )
    return plan


def plan_from_zeros(
    model: nn.Module, graph: ChannelGraph, *, coupling: Together = "joint", constants: Constants = "refuse"
) -> Plan:
    """The plan that removes the channels whose filters are zero already, whatever made them so.

    A channel whose filter is zero, but not its bias or the weight or bias of its batch norm, is a constant, and
    without it the model computes something else.

    Args:
        model: the traced model; with masks of `torch.nn.utils.prune` it is what they leave that counts.
        graph: from `lightning_prune.trace`. Groups that cannot be pruned stay, zero filters and all.
        coupling: see `plan_from_masks`.
        constants: ``refuse``; ``keep`` them; or ``remove`` them and what they added. Of what they added
            `lightning_prune.compensation.fold_constants_` makes a bias first.

    Raises:
        PlanError: layers that go together have other zero filters, or a constant, by ``constants``.

    Example:
        >>> import lightning_prune as lp
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> model[0].weight.data[1], model[0].bias.data[1] = 0, 0
        >>> plan = plan_from_zeros(model, lp.trace(model, torch.zeros(1, 2)))
        >>> plan.groups["0"].keep
        (0, 2)
    """
    graph.check(model)
    check_choice("constants", constants, Constants, PlanError)
    zero = {name: (effective_weight(model, name) == 0).cpu() for name, _ in model.named_parameters()}
    return _plan(graph, zero, coupling, True, constants, strict=False)


def _plan(
    graph: ChannelGraph,
    zero: Mapping[str, Tensor],
    coupling: Together,
    batch_norm: bool,
    constants: Constants,
    *,
    strict: bool,
) -> Plan:
    """Group by group, from where parameters are zero. strict: nothing that cannot go may be zero."""
    check_choice("coupling", coupling, Together, PlanError)
    groups = {}
    for group in graph.groups:
        gone = {layer.name: _masked_channels(group, layer, zero, strict=strict) for layer in group.layers}
        if not group.prunable:
            if strict and any(bool(of.any()) for of in gone.values()):
                raise PlanError(f"filters of group {group.name!r} are masked; it cannot be pruned: it {group.reason}")
            continue
        if constants != "remove":
            parts = [part for part in group.slices if part.masked and (batch_norm or not part.norm)]
            for owner in (*gone, None):  # None: what is masked where the whole group loses a channel
                mine = [part for part in parts if part.layer == owner]
                lost = torch.stack(list(gone.values())).all(0) if owner is None else gone[owner]
                constant = _constant(mine, owner or group.name, lost, zero, refuse=constants == "refuse")
                for name in gone if owner is None else [owner]:
                    gone[name] = gone[name] & ~constant
        if coupling == "joint":
            _check_alike(group, gone)
        all_gone = torch.stack(list(gone.values())).all(0)
        groups[group.name] = GroupPlan.of_masks(~all_gone, {name: ~of for name, of in gone.items()})
    plan = Plan(groups, coupling, batch_norm, Basis(graph))
    plan.check(graph)
    return plan


def _masked_channels(group: Group, layer: Layer, zero: Mapping[str, Tensor], *, strict: bool) -> Tensor:
    """(channels,) of a layer: whether all its filters are zero."""
    if layer.weight not in zero:
        return torch.zeros(group.size, dtype=torch.bool)
    filters = zero[layer.weight].movedim(layer.dim, 0).flatten(1).all(1)[layer.index]
    whole, part = filters.all(1), filters.any(1) & ~filters.all(1)
    if strict and bool(part.any()):
        channel = int(part.nonzero()[0])
        raise PlanError(
            f"the masks cut through group {group.name!r}: filters {ranges(layer.index[channel].tolist(), LIST)} of "
            f"{layer.name!r} are one channel and go together, and only some are masked"
        )
    return whole


def _constant(parts: Sequence[Slice], name: str, gone: Tensor, zero: Mapping[str, Tensor], *, refuse: bool) -> Tensor:
    """Which of these channels have a bias, or a batch norm, that is not zero."""
    found = torch.zeros_like(gone)
    for part in parts:
        if part.tensor in zero and zero[part.tensor].dim() == 1:
            constant = gone & ~zero[part.tensor][part.index].all(1)
            if refuse and bool(constant.any()):
                raise PlanError(
                    f"channels {ranges(numbers_of(constant), LIST)} of {name!r} are constants: their filters go, but "
                    f"{part.tensor!r} stays and is not zero. Set it to zero (in masks: leave it out), or see "
                    "plan_from_zeros(constants='keep' or 'remove')"
                )
            found |= constant
    return found


def _check_alike(group: Group, gone: Mapping[str, Tensor]) -> None:
    (first, one), *others = gone.items()
    for name, other in others:
        if not torch.equal(one, other):
            channel = int((one != other).nonzero()[0])
            masked, kept = (first, name) if one[channel] else (name, first)
            raise PlanError(
                f"the masks cut through group {group.name!r}: channel {channel} is masked in {masked!r} and not in "
                f"{kept!r}, which go together. Mask both alike, or pass coupling='union', under which each layer has "
                "its own masks"
            )


def _named(graph: ChannelGraph, masks: Mapping[str, Any]) -> dict[str, Tensor]:
    """Masks by the graph's names, checked."""
    state_dict = any(key.endswith("_mask") and f"{key.removesuffix('_mask')}_orig" in masks for key in masks)
    found = {}
    for key, mask in masks.items():
        if state_dict and not key.endswith("_mask"):
            continue
        base = key.removesuffix("_mask")
        name = next((name for name in (base, f"{base}_orig") if name in graph.shapes), None)
        if name is None:
            close = difflib.get_close_matches(base, graph.shapes, n=3)
            hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise PlanError(f"masks: the model has no parameter {base!r}{hint}")
        if not isinstance(mask, Tensor) or tuple(mask.shape) != tuple(graph.shapes[name]):
            got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise PlanError(f"mask {key!r} must be a tensor of shape {list(graph.shapes[name])}, got {got}")
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise PlanError(f"mask {key!r} has other values than 0 and 1: is it the weight itself? See plan_from_zeros")
        found[name] = mask.detach().cpu()
    return found
