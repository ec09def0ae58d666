"""The smaller model built beside the masked one before anybody trains that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lightning_prune.graph import ChannelGraph
from lightning_prune.graph.entry_points import EntryPoint
from lightning_prune.model_state.preservation import copy_without_masks
from lightning_prune.plan import Plan
from lightning_prune.reconstruction.masks import mask_once_
from lightning_prune.reconstruction.small_model import reconstruct_masked


@dataclass(frozen=True)
class Rehearsal:
    """What was run on a smaller model before the same channels were masked, and the state of the weights then."""

    plan: Plan
    compared: tuple[str, ...]
    weights: list[int]

    def holds(self, model: nn.Module) -> bool:
        """Whether no weight has changed since, masks aside."""
        return self.weights == versions(model)


def rehearse(model: nn.Module, graph: ChannelGraph, plan: Plan, entries: Sequence[EntryPoint]) -> tuple[str, ...]:
    """What was compared on a masked and a reconstructed copy; nothing if some channels had to stay.

    Raises:
        ReconstructionError: the smaller model would not be equal to the masked one.
    """
    masked = copy_without_masks(model)
    mask_once_(masked, graph, plan)
    _, report = reconstruct_masked(masked, graph, plan, entries)
    return () if report.left else report.compared  # else it has to be found out again which stay


def versions(model: nn.Module) -> list[int]:
    """How often each weight was written to, masks aside."""
    return [parameter._version for parameter in model.parameters()]
