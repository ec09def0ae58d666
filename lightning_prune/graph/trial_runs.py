"""How a model is run with fewer channels: does it run, and does it compute the same as with these channels masked."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.compared_runs import ComparedRuns
from lightning_prune.graph.entry_points import EntryPoint, head, is_forward
from lightning_prune.graph.model_copies import ModelCopy, Removed
from lightning_prune.graph.other_sizes import other_sizes, takes_size
from lightning_prune.graph.plain_numbers import PlainNumber, same_numbers
from lightning_prune.graph.repeated_blocks import repeated_blocks
from lightning_prune.graph.trial import Failure, Ran, Trial, run_copy
from lightning_prune.model_state.preservation import copy_without_masks, copy_without_values, folding


class TrialRuns:
    """Runs copies of one model, through each of its entry points and with each of their train flags, without channels.

    A plain forward is also tried at another batch and image size, if the model takes them.
    """

    def __init__(self, model: nn.Module, ran: Sequence[Ran]) -> None:
        self._model = model
        self._meta = ModelCopy(copy_without_values(model), has_values=False)
        self._real: ModelCopy | None = None
        self._ran = ran
        self._compared: list[tuple[Ran, Ran | None]] = []  # at the traced size, at another that the model takes
        self._others: list[Trial] | None = None
        self._trusts_quick: bool | None = None  # whether float64 agreed that results differ; None: not asked yet

    @cached_property
    def _forward(self) -> list[Trial]:
        """Plain forwards; the model with all its channels has run through each."""
        self._compared.clear()
        return [trial for ran in self._ran if is_forward(ran.entry) for trial in self._trials(ran.entry, ran.modes)]

    @property
    def _beyond_forward(self) -> list[Trial]:
        """Steps and callables, on few samples where that works."""
        if self._others is None:
            self._others = []
            for entry, modes, *_ in self._ran:
                if not is_forward(entry) and not entry.borrowed:
                    few = head(entry, 2)
                    trial = self._meta_trial(few, modes) or self._real_trial(few, modes)
                    trial = trial if trial.runs else self._real_trial(entry, modes)
                    self._others += [trial] if trial.runs else []
        return self._others

    def _trials(self, entry: EntryPoint, modes: Sequence[bool]) -> list[Trial]:
        """On the meta device, where a run costs neither memory nor arithmetic, if it works there."""
        trial = self._meta_trial(entry, modes)
        if trial is None:
            self._compared.append((Ran(entry, modes), None))
            # The model looks at values (detectors count boxes), which change with the channels as its numbers do.
            real = self._real_trial(entry, modes)
            return [real] if real.runs else []
        for other in other_sizes(entry):
            varied = self._meta_trial(other, modes)
            if varied is not None and takes_size(other, trial.leading, varied.leading):
                self._compared.append((Ran(entry, modes), Ran(other, modes)))
                return [trial, varied]
        self._compared.append((Ran(entry, modes), None))
        return [trial]

    @property
    def other_sizes(self) -> list[EntryPoint]:
        """The forwards at another size that the model takes."""
        return [other.entry for _, other in self._compared if other is not None]

    def _meta_trial(self, entry: EntryPoint, modes: Sequence[bool]) -> Trial | None:
        trial = Trial(self._meta, _on_meta(entry), modes)
        return trial if trial.runs else None

    def _real_trial(self, entry: EntryPoint, modes: Sequence[bool]) -> Trial:
        if self._real is None:
            self._real = ModelCopy(copy_without_masks(self._model), has_values=True)
        return Trial(self._real, entry, modes)

    def failure(self, graph: ChannelGraph, removed: Removed, *, beyond_forward: bool = False) -> Failure | None:
        """Why the model does not run without these channels, None if it does."""
        if not beyond_forward and "_forward" not in vars(self) and self._runs_as_recorded(graph, removed):
            return None
        trials = self._beyond_forward if beyond_forward else self._forward
        failure = self._failure(trials, graph, removed)
        if failure is None or not any([trial.warmed() for trial in trials]):  # noqa: C419  # all of them
            return failure
        # A run leaves something behind, such as an lru_cache, that the next one finds: both are run warm, and since
        # what was made from sizes is not made again, results have to tell.
        return self._failure(trials, graph, removed) or self.difference(graph, removed)

    def _runs_as_recorded(self, graph: ChannelGraph, removed: Removed) -> bool:
        """Whether the forwards run without these channels, at another size too, on the very numbers of the recording.

        That spares runs of the whole model, which tell what they should be otherwise. Where the very operators of the
        recording run at another size, there is no other path to be found at the traced one.
        """
        if folding(self._model):
            return False  # it may not run on the meta device, not even to be cut
        compared: list[tuple[Ran, Ran | None]] = []
        with self._meta.without(graph, removed):
            for ran in (ran for ran in self._ran if is_forward(ran.entry)):
                others = list(itertools.islice(other_sizes(ran.entry), 1))
                alike = [self._runs_alike(entry, ran) for entry in others]
                if None in alike or (alike != [True] and self._runs_alike(ran.entry, ran) is None):
                    return False
                compared.append((ran, Ran(others[0], ran.modes) if others else None))
        self._compared = compared
        return True

    def _runs_alike(self, entry: EntryPoint, ran: Ran) -> bool | None:
        """Whether the copy without values runs the same operators as the recording did; None: on other numbers."""
        numbers: list[PlainNumber] = []
        operators: list[Any] = []
        outputs: list[Tensor] = []
        for training in ran.modes:
            returned = run_copy(self._meta, _on_meta(entry), training, numbers, operators=operators)
            if isinstance(returned, Failure):
                return None
            outputs += returned
        leading = [len(tensor) for tensor in outputs if tensor.dim()]
        takes = entry.varied is None or takes_size(entry, ran.leading, leading)
        if not takes or ran.numbers is None or not same_numbers(ran.numbers, numbers):
            return None
        return list(ran.operators) == operators

    def _failure(self, trials: Sequence[Trial], graph: ChannelGraph, removed: Removed) -> Failure | None:
        with ExitStack() as stack:
            for copy in dict.fromkeys(trial.copy for trial in trials):
                stack.enter_context(copy.without(graph, removed))
            for trial in trials:
                if (failure := trial.failure([mean.counted.module for mean in graph.means])) is not None:
                    return replace(failure, other_size=trial.entry.varied is not None)
            return None

    def runs_alike(self, one: ChannelGraph, other: ChannelGraph, removed: Removed) -> bool:
        """Whether the smaller model runs the same operators on the same numbers and shapes under both graphs."""
        logs: list[list[str]] = [[], []]
        for graph, found in zip((one, other), logs, strict=True):
            for trial in (*self._forward, *self._beyond_forward):
                with trial.copy.without(graph, removed), trial.own_memory():
                    for training in trial.modes:
                        run_copy(trial.copy, trial.entry, training, log=found)
        return logs[0] == logs[1]

    def difference(self, graph: ChannelGraph, removed: Removed, *, varied: bool = False) -> Failure | None:
        """Why removing these channels does not equal masking them, None if it does.

        ``varied``: at another size instead of the traced one, where the model takes one.
        """
        compared = [other if varied and other is not None else traced for traced, other in self._compared]
        runs = [(ran.entry, training) for ran in compared for training in ran.modes]
        found = self._quick.differs(runs, graph, removed) if self._trusts_quick is not False else None
        if found is False:
            return None
        if not isinstance(found, Failure) or not self._trusts_quick:
            sure = self._sure.differs(runs, graph, removed)
            if isinstance(found, Failure):
                self._trusts_quick = isinstance(sure, Failure)  # else the model makes much of what float32 rounds
            found = sure
        if not isinstance(found, Failure) or not found.other_size:
            return found or None
        return self.difference(graph, removed) or found

    @cached_property
    def _quick(self) -> ComparedRuns:
        return ComparedRuns(self._model, torch.float32, repeated_blocks(self._model))

    @cached_property
    def _sure(self) -> ComparedRuns:
        return ComparedRuns(self._model, torch.float64, {})


def _on_meta(entry: EntryPoint) -> EntryPoint:
    return entry.mapped(lambda tensor: tensor.to("meta"))
