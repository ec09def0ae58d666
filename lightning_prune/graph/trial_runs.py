"""How a model is run with fewer channels: does it run, and does it compute the same as with these channels masked."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.graph.channel_graph import ChannelGraph
from lightning_prune.graph.entry_points import EntryPoint, head, is_forward
from lightning_prune.graph.model_copies import ModelCopy, Removed, double_copy, meta_copy
from lightning_prune.graph.other_sizes import other_sizes, takes_size
from lightning_prune.graph.plain_numbers import PlainNumber, PlainNumbers, computed_of
from lightning_prune.graph.running import KeepsDouble, normalise_mode, tensors_in
from lightning_prune.model_state.cutting import rescale_
from lightning_prune.model_state.journal import WritesUndone
from lightning_prune.model_state.preservation import copy_without_masks

LIMIT = 1e-8  # relative, in float64
Ran = tuple[EntryPoint, Sequence[bool]]  # with the train flags with which it works


@dataclass(frozen=True)
class Failure:
    """Why a smaller model did not run or was not equal: the modules that were running, innermost first."""

    stack: tuple[str, ...]
    message: str
    other_size: bool = False  # at the traced size all is well
    counts: frozenset[int] = frozenset()  # numbers of channels of which it may have been computed


@dataclass(eq=False)
class _Trial:
    """One entry point on one copy of the model."""

    copy: ModelCopy
    entry: EntryPoint
    modes: Sequence[bool]
    warm: bool = False
    numbers: list[PlainNumber] | Failure = field(init=False)
    leading: list[int] = field(default_factory=list)  # sizes of the outputs of the last run
    _left: dict[tuple[int, str], tuple[dict[str, Any], Any]] = field(default_factory=dict)  # in the model's attributes

    def __post_init__(self) -> None:
        self.numbers = self.plain_numbers()

    @property
    def runs(self) -> bool:
        """Whether the model with all its channels does."""
        return not isinstance(self.numbers, Failure)

    def plain_numbers(self) -> list[PlainNumber] | Failure:
        """Those that operators get, all modes in a row, or why it does not run."""
        numbers: list[PlainNumber] = []
        self.leading = []
        with self._own_memory():
            for training in self.modes:
                outputs = _run(self.copy, self.entry, training, numbers)
                if isinstance(outputs, Failure):
                    return outputs
                self.leading += [len(output) for output in outputs if output.dim()]
        return numbers

    @contextmanager
    def _own_memory(self) -> Iterator[None]:
        """Find in the model's attributes what this trial's runs left there (anchors of one size), no other's."""
        for (_, name), (own, value) in self._left.items():
            own[name] = value
        before = [(vars(module), dict(vars(module))) for module in self.copy.modules]
        yield
        for own, earlier in before:
            for name, value in own.items():
                if earlier.get(name, own) is not value:
                    self._left[id(own), name] = own, value

    def warmed(self) -> bool:
        """Run the model with all its channels once more, if it was run once; whether the path was another."""
        if self.warm or not self.runs:
            return False
        cold, self.numbers, self.warm = self.numbers, self.plain_numbers(), True
        return repr(cold) != repr(self.numbers)

    def failure(self, rescaled: Collection[str] = ()) -> Failure | None:
        """What goes wrong now that the model has fewer channels. rescaled: modules that make up for other numbers."""
        found = self.plain_numbers()
        if isinstance(found, Failure):
            return found
        if isinstance(self.numbers, Failure) or self.copy.has_values:
            return None  # its code may look at values, and plain numbers change with them
        for before, after in zip(self.numbers, found, strict=False):
            if before.operator != after.operator:
                return Failure(after.stack, f"takes another path: {before.operator}, then {after.operator}")
            if repr(before.values) != repr(after.values) and not {*after.stack[:1]} & {*rescaled}:  # NaN is not NaN
                message = f"{before.operator} gets {before.values}, then {after.values}"
                return Failure(after.stack, message, counts=computed_of(before.values, after.values))
        return None if len(self.numbers) == len(found) else Failure((), "takes another path with fewer channels")


class TrialRuns:
    """Runs copies of one model, through each of its entry points and with each of their train flags, without channels.

    A plain forward is also tried at another batch and image size, if the model takes them.
    """

    def __init__(self, model: nn.Module, ran: Sequence[Ran]) -> None:
        self._model = model
        self._meta = ModelCopy(meta_copy(model), has_values=False)
        self._real: ModelCopy | None = None
        self._double: ModelCopy | None = None
        self._forward: list[_Trial] = []
        self._compared: list[Ran] = []
        for entry, modes in ran:
            if is_forward(entry):
                self._forward += self._trials(entry, modes)
        self._ran = ran
        self._others: list[_Trial] | None = None

    @property
    def _beyond_forward(self) -> list[_Trial]:
        """Steps and callables, on few samples where that works."""
        if self._others is None:
            self._others = []
            for entry, modes in self._ran:
                if not is_forward(entry) and not entry.borrowed:
                    few = head(entry, 2)
                    trial = self._meta_trial(few, modes) or self._real_trial(few, modes)
                    trial = trial if trial.runs else self._real_trial(entry, modes)
                    self._others += [trial] if trial.runs else []
        return self._others

    def _trials(self, entry: EntryPoint, modes: Sequence[bool]) -> list[_Trial]:
        """On the meta device, where a run costs neither memory nor arithmetic, if it works there."""
        trial = self._meta_trial(entry, modes)
        self._compared.append((entry, modes))
        if trial is None:
            # The model looks at values (detectors count boxes), which change with the channels as its numbers do.
            real = self._real_trial(entry, modes)
            return [real] if real.runs else []
        for other in other_sizes(entry):
            varied = self._meta_trial(other, modes)
            if varied is not None and takes_size(other, trial.leading, varied.leading):
                self._compared.append((other, modes))
                return [trial, varied]
        return [trial]

    def _meta_trial(self, entry: EntryPoint, modes: Sequence[bool]) -> _Trial | None:
        trial = _Trial(self._meta, entry.mapped(lambda tensor: tensor.to("meta")), modes)
        return trial if trial.runs else None

    def _real_trial(self, entry: EntryPoint, modes: Sequence[bool]) -> _Trial:
        if self._real is None:
            self._real = ModelCopy(copy_without_masks(self._model), has_values=True)
        return _Trial(self._real, entry, modes)

    def failure(self, graph: ChannelGraph, removed: Removed, *, beyond_forward: bool = False) -> Failure | None:
        """Why the model does not run without these channels, None if it does."""
        trials = self._beyond_forward if beyond_forward else self._forward
        failure = self._failure(trials, graph, removed)
        if failure is None or not any([trial.warmed() for trial in trials]):  # noqa: C419  # all of them
            return failure
        # A run leaves something behind, such as an lru_cache, that the next one finds: both are run warm, and since
        # what was made from sizes is not made again, results have to tell.
        return self._failure(trials, graph, removed) or self.difference(graph, removed)

    def _failure(self, trials: Sequence[_Trial], graph: ChannelGraph, removed: Removed) -> Failure | None:
        with ExitStack() as stack:
            for copy in dict.fromkeys(trial.copy for trial in trials):
                stack.enter_context(copy.without(graph, removed))
            for trial in trials:
                if (failure := trial.failure([mean.counted.module for mean in graph.means])) is not None:
                    return replace(failure, other_size=trial.entry.varied is not None)
            return None

    def difference(self, graph: ChannelGraph, removed: Removed, *, sizes: bool = False) -> Failure | None:
        """Why removing these channels does not equal masking them, None if it does. ``sizes``: at others too."""
        if self._double is None:
            self._double = ModelCopy(double_copy(self._model), has_values=True)
        trial = self._double
        double = [(entry.mapped(_double), modes) for entry, modes in self._compared if sizes or not entry.varied]
        runs = [(entry, training) for entry, modes in double for training in modes]
        with trial.masked(graph, removed):
            masked = [_run(trial, entry, training, keeps=True) for entry, training in runs]
        with trial.without(graph, removed):
            rescale_(trial.model, graph.rescalings(removed))
            for (entry, training), before in zip(runs, masked, strict=True):
                if isinstance(before, Failure):
                    continue  # does not run in float64 at all: nothing to compare with
                after = _run(trial, entry, training, keeps=True)
                if isinstance(after, Failure):
                    return after
                if not _close(before, after):
                    return Failure((), "its results change", other_size=entry.varied is not None)
        return None


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _run(
    copy: ModelCopy,
    entry: EntryPoint,
    training: bool,
    numbers: list[PlainNumber] | None = None,
    *,
    keeps: bool = False,
) -> list[Tensor] | Failure:
    """The tensors that a model returns. numbers: takes down the plain numbers that operators get. keeps: casts
    to a shorter type are left out, where that works: they round other sums otherwise.
    """
    entry = entry.own()
    # Whatever the code writes to its weights (a teacher's average) would come on top in the next run.
    with copy.untouched(), WritesUndone(copy.model) if numbers is None else nullcontext():
        torch.manual_seed(0)
        casts = KeepsDouble() if keeps else nullcontext()
        with copy.running() as running, casts if numbers is None else PlainNumbers(running, numbers):
            try:
                normalise_mode(copy.model, training=training)
                return tensors_in(entry.run(copy.model, running))
            except Exception as error:  # noqa: BLE001 - whatever a user's forward may raise
                message = str(error).strip().partition("\n")[0]
                failure = Failure(running.paths, f"{type(error).__name__}: {message}")
    return _run(copy, entry, training) if keeps else failure


def _close(before: list[Tensor], after: list[Tensor]) -> bool:
    if [t.shape for t in before] != [t.shape for t in after]:
        return False
    for first, second in zip(before, after, strict=True):
        if first.is_floating_point():
            finite = first.isfinite() & second.isfinite()
            gap = (first - second)[finite].abs()
            if gap.any() and float(gap.max()) > LIMIT * float(first[finite].abs().max()):
                return False
    return True
