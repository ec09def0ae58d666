"""Depth pruning: whole residual blocks whose masked branch adds nothing are no longer computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_prune.errors import PlanError, ReconstructionError
from lightning_prune.graph import ChannelGraph
from lightning_prune.graph.entry_points import entry_points
from lightning_prune.model_state.cutting import forget_dense_
from lightning_prune.model_state.preservation import copy_without_masks, knows_shapes
from lightning_prune.plan import Plan
from lightning_prune.reconstruction.blocks import Block, block_plan, residual_blocks
from lightning_prune.reconstruction.dropped_blocks import replace_blocks_
from lightning_prune.reconstruction.lossless import LosslessReport
from lightning_prune.reconstruction.masks import mask_once_
from lightning_prune.reconstruction.rehearsal import rehearse


def choose_blocks(
    blocks: Sequence[Block], amount: int | float | Sequence[str], scores: Mapping[str, float] | None = None
) -> tuple[Block, ...]:
    """The blocks that are meant: by name, or a number or a share of those that can be dropped, the weakest first.

    Args:
        blocks: from `residual_blocks`.
        amount: names; a number >= 1; or a share in (0, 1), of which ``round(share * blocks)`` go.
        scores: {block: score}, high means keep, as `lightning_prune.sensitivity.block_sensitivity` measures them;
            needed for a number or a share.

    Raises:
        PlanError: an unknown block or one that cannot be dropped, a missing score, or an amount without meaning.

    Example:
        >>> blocks = Block("layer1.0"), Block("layer1.1"), Block("layer2.0", reason="computes more")
        >>> [block.name for block in choose_blocks(blocks, 1, {"layer1.0": 0.3, "layer1.1": 0.1})]
        ['layer1.1']
    """
    known = {block.name: block for block in blocks}
    removable = [block for block in blocks if block.removable]
    if isinstance(amount, (int, float)):
        number = round(amount * len(removable)) if isinstance(amount, float) and 0 < amount < 1 else amount
        if isinstance(amount, bool) or not isinstance(number, int) or not 0 <= number <= len(removable):
            raise PlanError(
                f"blocks are given by name, by number or as a share in (0, 1); got {amount!r}, and "
                f"{len(removable)} can be dropped"
            )
        missing = [block.name for block in removable if block.name not in (scores or {})]
        if scores is None or missing:
            raise PlanError(f"scores are needed to choose blocks, and there is none of {', '.join(missing[:3])}")
        weakest = sorted(removable, key=lambda block: scores[block.name])[:number]
        return tuple(block for block in removable if block in weakest)
    for name in amount:
        if name not in known:
            names = ", ".join(block.name for block in removable) or "none"
            raise PlanError(f"there is no residual block {name!r}; those that can be dropped are {names}")
        if known[name].reason is not None:
            raise PlanError(f"block {name!r} cannot be dropped: it {known[name].reason}")
    return tuple(known[name] for name in dict.fromkeys(amount))


def drop_blocks_(
    model: nn.Module,
    graph: ChannelGraph,
    blocks: int | float | Sequence[str],
    example_inputs: Any,
    *,
    scores: Mapping[str, float] | None = None,
    also: Sequence[Any] = (),
) -> tuple[Plan, LosslessReport]:
    """Drop whole residual blocks in place: their modules are replaced by what remains once their branch is masked.

    The result equals the model with these branches masked, whether or not they were: all of it is compared in float64
    on the example inputs, at another batch and image size and in train mode, and put back if it differs. Fine-tuning
    the masked model (`block_plan`, `lightning_prune.mask_`) before is fine-tuning this one. A `LosslessReport` says
    nothing of the accuracy: dropping a block of a trained network costs some.

    Args:
        model: the traced model; masks removed (`MaskHandle.remove`).
        graph: of the model as it is.
        blocks: names, a number, or a share, see `choose_blocks`.
        example_inputs: as for `lightning_prune.trace`.
        scores: see `choose_blocks`.
        also: what else to compare on, as for `lightning_prune.trace`.

    Returns:
        The plan that masks the same, and the comparison. `lightning_prune.save` keeps which blocks were dropped.
        Parameters of dropped blocks are in no model any more: build optimizers afterwards.

    Raises:
        PlanError: see `choose_blocks`, or the graph belongs to another model.
        ReconstructionError: masks are still held, or the model's code needs a block as it was; nothing was changed.

    Example:
        >>> import torch, lightning_prune as lp
        >>> model, images = lp.models.cifar_thin.resnet20().eval(), torch.zeros(1, 3, 16, 16)
        >>> plan, report = drop_blocks_(model, lp.trace(model, images), ["layer1.1"], images)
        >>> report.passed, model.layer1[1]
        (True, DroppedBlock(
          (relu): ReLU()
        ))
    """
    if knows_shapes(model):
        raise ReconstructionError("masks or gradient hooks are registered on the model: call MaskHandle.remove() first")
    chosen = choose_blocks(residual_blocks(model, graph, example_inputs), blocks, scores)
    plan = block_plan(graph, chosen)
    if chosen:
        graph.warn_of_unreached()
    forward, *others = entry_points(example_inputs, also)
    training = replace(forward, name="forward while training", modes=(True,), required=False)
    masked = copy_without_masks(model)
    mask_once_(masked, graph, plan)
    undo = replace_blocks_(model, {block.name: block.remains for block in chosen})
    try:
        report = rehearse(masked, model, [forward, training, *others], lossless=True)
    except BaseException:
        undo()
        raise
    forget_dense_(model)
    return plan, report
