"""One run of a copy of a model: what it returns, or why it fails; and on which plain numbers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_prune.graph.entry_points import EntryPoint
from lightning_prune.graph.model_copies import ModelCopy
from lightning_prune.graph.plain_numbers import OperatorLog, PlainNumber, PlainNumbers, computed_of
from lightning_prune.graph.running import KeepsDouble, normalise_mode, tensors_in
from lightning_prune.model_state.originals import WritesUndone


class Ran(NamedTuple):
    """An entry point, and the train flags with which it runs.

    numbers: the plain numbers that operators got then, if the run left nothing behind in the model. operators: all that
    ran. leading: the leading sizes of what it returned.
    """

    entry: EntryPoint
    modes: Sequence[bool]
    numbers: Sequence[PlainNumber] | None = None
    leading: Sequence[int] = ()
    operators: Sequence[Any] = ()


@dataclass(frozen=True)
class Failure:
    """Why a smaller model did not run or was not equal: the modules that were running, innermost first."""

    stack: tuple[str, ...]
    message: str
    other_size: bool = False  # at the traced size all is well
    counts: frozenset[int] = frozenset()  # numbers of channels of which it may have been computed


@dataclass(eq=False)
class Trial:
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
        with self.own_memory():
            for training in self.modes:
                outputs = run_copy(self.copy, self.entry, training, numbers)
                if isinstance(outputs, Failure):
                    return outputs
                self.leading += [len(output) for output in outputs if output.dim()]
        return numbers

    @contextmanager
    def own_memory(self) -> Iterator[None]:
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


def run_copy(
    copy: ModelCopy,
    entry: EntryPoint,
    training: bool,
    numbers: list[PlainNumber] | None = None,
    *,
    operators: list[Any] | None = None,
    log: list[str] | None = None,
    keeps: bool = False,
) -> list[Tensor] | Failure:
    """The tensors that a model returns.

    numbers: takes down the plain numbers that operators get. operators: those that run. log: takes down all that they
    get. keeps: casts to a shorter type are left out, where that works: they round other sums otherwise.
    """
    entry = entry.own()
    # Whatever the code writes to its weights (a teacher's average) would come on top in the next run.
    with copy.untouched(), WritesUndone(copy.model) if numbers is None and copy.has_values else nullcontext():
        torch.manual_seed(0)
        with copy.running() as running, ExitStack() as modes:
            if numbers is not None:
                modes.enter_context(PlainNumbers(running, numbers, operators))
            elif log is not None:
                modes.enter_context(OperatorLog(log))
            elif keeps:
                modes.enter_context(KeepsDouble())
            try:
                normalise_mode(copy.model, training=training)
                return tensors_in(entry.run(copy.model, running))
            except Exception as error:  # noqa: BLE001 - whatever a user's forward may raise
                message = str(error).strip().partition("\n")[0]
                failure = Failure(running.paths, f"{type(error).__name__}: {message}")
    return run_copy(copy, entry, training) if keeps else failure
