"""Does a model compute the same without channels as with these channels masked?

Asked of layouts that were read off one run. First in float32 and without the blocks that repeat another, where rounding
hides no more than 1e-5 of the results; what differs there is asked again in float64, of all blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.entry_points import EntryPoint
from lightning_prune.graph.model_copies import ModelCopy, Removed, cast_copy
from lightning_prune.graph.trial import Failure, run_copy

LIMITS = {torch.float32: 1e-5, torch.float64: 1e-8}  # relative to the largest number


class ComparedRuns:
    """Pairs of runs of one model in one floating type. left_out: {path: module} of what need not run."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, left_out: Mapping[str, nn.Module]) -> None:
        self._model, self._dtype, self._left_out = model, dtype, left_out

    @cached_property
    def _copy(self) -> ModelCopy:
        return ModelCopy(cast_copy(self._model, self._dtype, self._left_out), has_values=True)

    def differs(
        self, runs: Sequence[tuple[EntryPoint, bool]], graph: ChannelGraph, removed: Removed
    ) -> Failure | Literal[False] | None:
        """Why results differ; None if nothing can be compared: the model does not run so.

        runs: entry points, each with the train flag.
        """
        cast = [(entry.mapped(self._cast), training) for entry, training in runs]
        with self._copy.masked(graph, removed):
            masked = [run_copy(self._copy, *run, keeps=self._dtype == torch.float64) for run in cast]
        comparable = [isinstance(one, list) and self._is_comparable(one) for one in masked]
        if self._left_out and not all(comparable):
            self._left_out = {}
            del self._copy
            return self.differs(runs, graph, removed)
        if not any(comparable) or (self._dtype == torch.float32 and not all(comparable)):
            return None
        with self._copy.without(graph, removed):
            for (entry, training), before in zip(cast, masked, strict=True):
                if isinstance(before, Failure):
                    continue
                after = run_copy(self._copy, entry, training, keeps=self._dtype == torch.float64)
                if isinstance(after, Failure) or not self._close(before, after):
                    failure = after if isinstance(after, Failure) else Failure((), "its results change")
                    return Failure(failure.stack, failure.message, other_size=entry.varied is not None)
        return False

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

    def _is_comparable(self, outputs: list[Tensor]) -> bool:
        """Whether no number is beyond float32."""
        floating = (tensor for tensor in outputs if tensor.is_floating_point())
        return self._dtype == torch.float64 or all(bool(tensor.isfinite().all()) for tensor in floating)

    def _close(self, before: list[Tensor], after: list[Tensor]) -> bool:
        if [t.shape for t in before] != [t.shape for t in after]:
            return False
        for first, second in zip(before, after, strict=True):
            if first.is_floating_point():
                finite = first.isfinite() & second.isfinite()
                if not torch.equal(first[~finite].isnan(), second[~finite].isnan()):
                    return False  # NaN where there was a number, or a number where there was NaN
                gap = (first - second)[finite].abs()
                limit = LIMITS[self._dtype] * float(first[finite].abs().max()) if finite.any() else 0.0
                if gap.any() and float(gap.max()) > limit:
                    return False
        return True
