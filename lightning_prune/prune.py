"""Everything in one call, without a Trainer: trace, score, select, mask, reconstruct, check, measure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_prune.criteria import Criterion, Scores
from lightning_prune.graph import ChannelGraph
from lightning_prune.graph.model_checks import check_traceable
from lightning_prune.measure import Measurement, measure
from lightning_prune.model_state.preservation import copy_without_masks
from lightning_prune.plan import Coupling, Plan
from lightning_prune.reconstruction import ChannelMap, LosslessReport
from lightning_prune.reconstruction.small_model import reconstruct_masked
from lightning_prune.selection import Selection
from lightning_prune.session import PruningSession


@dataclass(frozen=True)
class PruneResult:
    """What `prune` returns.

    Attributes:
        model: the reconstructed model.
        masked: the masked model, dense in shape, masks held.
        graph: channel groups of the dense model.
        scores: per group, high means keep.
        plan: what was kept.
        before: cost of the dense model.
        after: cost of the reconstructed model.
        lossless: ``masked`` against ``model`` in float64: on the example inputs, at another size, on what is given as
            ``also``.
    """

    model: nn.Module
    masked: nn.Module
    graph: ChannelGraph
    scores: Scores
    plan: Plan
    before: Measurement
    after: Measurement
    lossless: LosslessReport

    def __repr__(self) -> str:
        lossless = self.lossless
        left = f", {len(lossless.left)} groups kept their width" if lossless.left else ""
        return (
            f"PruneResult({self.before.total_params:,} → {self.after.total_params:,} parameters, "
            f"max relative error {lossless.max_rel_error:.1e} in {lossless.dtype}{left})"
        )

    @property
    def channels(self) -> ChannelMap:
        """Old and new channels, layer by layer."""
        return ChannelMap.of(self.model)


def prune(
    model: nn.Module,
    example_inputs: Any,
    *,
    criterion: Criterion | str = "l1",
    ratio: float = 0.5,
    selection: Selection | Plan | None = None,
    coupling: Coupling = "joint",
    batch_norm: bool = True,
    statistics: bool = False,
    batches: Iterable[Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    scores: Scores | None = None,
    compensate: Callable[[nn.Module, ChannelGraph, Plan], Any] | None = None,
    also: Sequence[Any] = (),
) -> PruneResult:
    """Prune any eager model; the model itself is left as it is.

    Args:
        model: any module, no change to its code needed.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments.
        criterion: an instance, or a name such as "l1", "fpgm", "jre".
        ratio: share of channels removed over the network; ignored if ``selection`` is given.
        selection: for example ``Budget(flops=0.5, round_to=8)``; or a plan of this model, perhaps changed
            (`Plan.keep`), to carry it out.
        coupling: ``joint``, ``union`` or ``intersection``, see `Selection.select`.
        batch_norm: mask batch norms with their filters.
        statistics: prune channels under layer norms and the like too, which is not lossless, see `trace`.
        batches: data for criteria that look at activations or gradients.
        loss: ``loss(model, batch)`` for criteria that look at gradients.
        scores: of this model from an earlier call or a file (`Scores.load`); then nothing is scored and
            ``criterion`` is ignored. One scoring pass serves many budgets.
        compensate: repairs a copy for what the plan removes, before it is masked and reconstructed; for example
            ``lambda *of: least_squares_(*of, batches)`` from `lightning_prune.compensation`.
        also: what else the model will run: inputs that take other branches, callables that are given a copy of the
            model; traced and compared as the forward is, see `trace`.

    Raises:
        PruningError: one of its kinds, naming the cause; nothing was changed.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> result = prune(model, torch.randn(1, 3, 8, 8), criterion="l2", ratio=0.5)
        >>> result.model[0].out_channels, result.lossless.passed
        (4, True)
        >>> str(result).split(",")[0]
        'PruneResult(276 → 140 parameters'
    """
    check_traceable(model)  # before it is copied
    session = PruningSession(
        copy_without_masks(model),
        example_inputs,
        criterion=criterion,
        ratio=ratio,
        selection=selection.named(model) if isinstance(selection, Selection) else selection,
        coupling=coupling,
        batch_norm=batch_norm,
        statistics=statistics,
        also=also,
    )
    if scores is None:
        scores = session.score(batches, loss)
    else:
        session.scores = scores
    plan, masked = session.select(), session.model
    if compensate is not None:
        compensate(masked, session.graph, plan)
    session.mask_(plan)
    small, lossless = reconstruct_masked(masked, session.graph, plan, session.entries)
    return PruneResult(
        small,
        masked,
        session.graph,
        scores,
        plan,
        measure(model, example_inputs),
        measure(small, example_inputs),
        lossless,
    )
