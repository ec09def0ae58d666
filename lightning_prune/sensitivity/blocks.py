"""What a metric loses by masking one residual block alone: the score by which blocks are dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import isfinite

from torch import nn

from lightning_prune.errors import SensitivityError, check_choice
from lightning_prune.graph import ChannelGraph
from lightning_prune.plan import Plan
from lightning_prune.reconstruction.blocks import Block, block_plan
from lightning_prune.sensitivity.curves import Mode, Point, Sensitivity
from lightning_prune.sensitivity.measuring import evaluated


def block_sensitivity(
    model: nn.Module,
    graph: ChannelGraph,
    blocks: Iterable[Block],
    evaluate: Callable[[nn.Module], float],
    *,
    mode: Mode = "max",
) -> dict[str, float]:
    """The drop of a metric for every block that can be dropped, its branch alone masked; high means keep.

    Args:
        model: the traced model, without masks; left as it was.
        graph: from `lightning_prune.trace`.
        blocks: from `lightning_prune.reconstruction.residual_blocks`; others are left out.
        evaluate: see `measure_sensitivity`.
        mode: see `measure_sensitivity`.

    Returns:
        {block: drop}, infinite where the metric was no finite number.

    Raises:
        SensitivityError: the dense metric is no finite number.

    Example:
        >>> import torch, lightning_prune as lp
        >>> _ = torch.manual_seed(0)
        >>> model, images = lp.models.cifar_thin.resnet20().eval(), torch.randn(2, 3, 16, 16)
        >>> graph, target = lp.trace(model, images), model(images).detach()
        >>> blocks = lp.reconstruction.residual_blocks(model, graph, images)[:2]
        >>> error = lambda model: float((model(images) - target).square().mean())
        >>> scores = block_sensitivity(model, graph, blocks, error, mode="min")
        >>> sorted(scores), min(scores.values()) > 0
        (['layer1.0', 'layer1.1'], True)
    """
    check_choice("mode", mode, Mode, SensitivityError)
    dense = evaluated(model, graph, Plan({}), evaluate)
    if not isfinite(dense):
        raise SensitivityError(f"the metric of the dense model is {dense}: there is nothing to compare with")
    alone = {block.name: block_plan(graph, [block]) for block in blocks if block.removable}
    values = {name: evaluated(model, graph, plan, evaluate) for name, plan in alone.items()}
    scale = Sensitivity(dense, (), {}, mode)
    return {name: scale.drop(Point(name, 1.0, 0, v if isfinite(v) else float("nan"))) for name, v in values.items()}
