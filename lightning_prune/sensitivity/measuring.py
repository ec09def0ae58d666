"""Mask the weakest share of one group, evaluate, undo: for every group and ratio."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import NoEffectWarning, PlanError, SensitivityError, check_choice
from lightning_prune.graph import ChannelGraph
from lightning_prune.model_state.digest import digest_of
from lightning_prune.model_state.preservation import knows_shapes, preserved
from lightning_prune.plan import Plan
from lightning_prune.reconstruction import mask_
from lightning_prune.selection import LayerRatio
from lightning_prune.selection.base import check_ratio
from lightning_prune.sensitivity.curves import Mode, Point, Sensitivity
from lightning_prune.sensitivity.journal import DENSE, Journal, Key

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def measure_sensitivity(
    model: nn.Module,
    graph: ChannelGraph,
    scores: Mapping[str, Tensor],
    evaluate: Callable[[nn.Module], float],
    *,
    ratios: Sequence[float] = RATIOS,
    mode: Mode = "max",
    metric: str = "metric",
    path: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], object] | None = None,
    **constraints: Any,
) -> Sensitivity:
    """Evaluate a model with the weakest share of one group masked, for every prunable group and ratio.

    The channels are those that ``LayerRatio(ratio)`` removes of the group, jointly. Masks are undone after each
    evaluation: the model, its modes, buffers, gradients and random states are left as they were. Ratios that come to
    the same channels are evaluated once.

    Args:
        model: the traced model, without masks.
        graph: from `lightning_prune.trace`.
        scores: from `lightning_prune.score`.
        evaluate: the metric of the model, which is in eval mode, as a number; always on the same batches. Runs without
            gradients.
        ratios: shares in (0, 1).
        mode: ``max`` if a high metric is good (accuracy), ``min`` if a low one is (loss).
        metric: its name, for tables and pictures.
        path: file of JSON lines to which every value is added as soon as it is known; a later call with the same
            weights, scores, mode, constraints and ``settings`` goes on from there.
        settings: plain data that the values depend on besides, such as the number of batches.
        progress: called with the evaluations that are done, and their number.
        constraints: ``ignore``, ``round_to`` and ``min_channels`` of `lightning_prune.selection.Selection`.

    Raises:
        SensitivityError: masks are held already, the dense metric is no finite number, or the file is damaged or of
            other settings.
        PlanError: no ratio, one twice, or one outside (0, 1); nothing to prune.
        ScoreError: see `lightning_prune.selection.Selection.select`.

    Example:
        >>> import lightning_prune as lp
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> images, graph = torch.randn(4, 3, 8, 8), lp.trace(model, torch.zeros(1, 3, 8, 8))
        >>> target = model(images).detach()
        >>> found = measure_sensitivity(
        ...     model, graph, lp.score(model, graph, "l1"), ratios=[0.25, 0.5], mode="min", metric="error",
        ...     evaluate=lambda model: float((model(images) - target).square().mean()),
        ... )
        >>> [(point.group, point.ratio, point.removed) for point in found.points]
        [('0', 0.25, 2), ('0', 0.5, 4)]
        >>> found.dense, found.drop(found.points[0]) < found.drop(found.points[1])
        (0.0, True)
    """
    check_choice("mode", mode, Mode, SensitivityError)
    check_ratios(ratios)
    if knows_shapes(model):
        raise SensitivityError("masks are held on the model already: call MaskHandle.undo() or remove() first")
    plans = _plans(graph, scores, sorted(ratios), constraints)
    about = {
        "weights": digest_of(model.state_dict()),
        "scores": digest_of({name: scores[name] for name in sorted(plans)}),
        "mode": mode,
        "constraints": repr(sorted(constraints.items())),
        **(settings or {}),
    }
    journal = Journal(None if path is None else Path(path), about)
    wanted: dict[Key, Plan] = {(DENSE, 0): Plan({})}
    for group, by_ratio in plans.items():
        wanted |= {(group, len(plan.groups[group].removed)): plan for plan in by_ratio.values() if plan}
    left = {key: plan for key, plan in wanted.items() if key not in journal.values}
    done = len(wanted) - len(left)
    for key, plan in left.items():
        if progress is not None:
            progress(done, len(wanted))
        value = evaluated(model, graph, plan, evaluate)
        if key == (DENSE, 0) and not math.isfinite(value):
            raise SensitivityError(f"the {metric} of the dense model is {value}: there is nothing to compare with")
        journal.add(key, value)
        done += 1
    if progress is not None:
        progress(done, len(wanted))
    dense = journal.values[DENSE, 0]
    points = [
        Point(group, ratio, removed := len(plan.groups[group].removed), journal.values.get((group, removed), dense))
        for group, by_ratio in plans.items()
        for ratio, plan in by_ratio.items()
    ]
    return Sensitivity(dense, tuple(points), {name: graph.group(name).size for name in plans}, mode, metric)


def check_ratios(ratios: Sequence[float]) -> None:
    """Refuse none, one twice, and any outside (0, 1)."""
    if not ratios or len(set(ratios)) < len(ratios) or 0 in map(check_ratio, ratios):
        raise PlanError(f"ratios are shares in (0, 1), at least one, and each once; got {list(ratios)}")


def _plans(
    graph: ChannelGraph, scores: Mapping[str, Tensor], ratios: Sequence[float], constraints: Mapping[str, Any]
) -> dict[str, dict[float, Plan]]:
    """{group: {ratio: what it alone loses}}, in the order the model runs."""
    found: dict[str, dict[float, Plan]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoEffectWarning)
        for ratio in ratios:
            plan = LayerRatio(ratio, **constraints).select(graph, scores)
            for name, group in plan.groups.items():
                found.setdefault(name, {})[ratio] = replace(plan, groups={name: group})
    if not any(plan for by_ratio in found.values() for plan in by_ratio.values()):
        raise PlanError("no ratio removes a channel of any group; give larger ratios, or fewer constraints")
    return found


def evaluated(model: nn.Module, graph: ChannelGraph, plan: Plan, evaluate: Callable[[nn.Module], float]) -> float:
    """The metric of the model in eval mode, with what a plan removes masked meanwhile."""
    with preserved(model), torch.no_grad(), mask_(model, graph, plan):
        model.eval()
        value = evaluate(model)
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise SensitivityError(f"evaluate has to return a number, it returned a {type(value).__name__}") from error
