"""Try smaller channels out before anyone relies on them: sizes in Python code show only when the code runs.

After the constraints are resolved the model is run once more with about half of the channels of every group gone,
on the meta device, where that costs neither memory nor arithmetic (`rehearsal_bench`). A failure names the
module; the sizes fixed in modules of its type are then met in another way, or their channels are left as they are.
Where the layout of channels was read off one run (views, chunks), other shares of them go too, and results are
compared, since a wrong guess need not fail.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from lightning_prune.graph.build_groups import Classes
from lightning_prune.graph.constraints import Choice, Constraint, Grid, Grouped, Merge
from lightning_prune.graph.groups import ChannelGraph, Group
from lightning_prune.graph.rehearsal_bench import Bench, Failure, even, first, half, last, most, odd


@dataclass
class Decisions:
    """What the trials came to.

    Attributes:
        choices: per module type, how the sizes in its code are met.
        held: per module path, why channels that it reads stay.
        held_whole: those of which the channels that they make stay too.
    """

    choices: dict[str, Choice] = field(default_factory=dict)
    held: dict[str, str] = field(default_factory=dict)
    held_whole: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Draft:
    """A graph under certain decisions, and what is still only a guess in it.

    Attributes:
        graph: the groups.
        places: module paths whose code holds sizes of prunable channels, with the module's type.
        guessed: types whose layout was read off one run, so that results have to be compared.
        uneven: some channels are cut into pieces of different sizes.
    """

    graph: ChannelGraph
    places: dict[str, str]
    guessed: set[str]
    uneven: bool = False


def places_of(
    constraints: Sequence[Constraint], choices: dict[str, Choice], classes: Classes
) -> tuple[dict[str, str], set[str]]:
    """Where sizes of channels that may go were met, and the module types whose layouts are guesses."""
    places: dict[str, str] = {}
    guessed: set[str] = set()
    for constraint in constraints:
        if isinstance(constraint, Grouped) or (isinstance(constraint, Grid) and constraint.exact):
            continue
        if not constraint.place.stack or not classes.may_go(constraint.values):
            continue
        places[constraint.place.stack[0]] = constraint.place.kind
        repaired = choices.get(constraint.place.kind, Choice.AS_IS).repairs
        if repaired or not isinstance(constraint, Merge):
            guessed.add(constraint.place.kind)
    return places, guessed


def settle(model: nn.Module, example_inputs: Any, modes: list[bool], draft: Callable[[Decisions], Draft]) -> Draft:
    """The graph whose channels can be removed without the model's code breaking.

    Args:
        model: the traced model.
        example_inputs: what it was traced on.
        modes: train flags of the runs that succeeded.
        draft: builds the graph under given decisions; returns the same object if they come to the same.
    """
    decisions = Decisions()
    bench = Bench(model, example_inputs, modes)
    current = draft(decisions)
    while current.graph.prunable_groups:
        failure = _failing(bench, current)
        if failure is None:
            break
        before = current
        while current is before:  # some choices come to the same
            _decide(decisions, current, failure, model)
            current = draft(decisions)
    return current


def _failing(bench: Bench, draft: Draft) -> Failure | None:
    """The first thing that goes wrong with fewer channels."""
    groups = draft.graph.prunable_groups
    failure = bench.runs(draft.graph, groups, half)
    if failure is None and draft.guessed:
        for share in (first, last, most, even, odd):
            failure = failure or bench.runs(draft.graph, groups, share)
        failure = failure or _differing(bench, draft)
    return failure


def _differing(bench: Bench, draft: Draft) -> Failure | None:
    """A module type whose channels, removed alone, change the results; None if all together do not."""
    exact = tuple(group for group in draft.graph.prunable_groups if group.statistics is None)
    shares = (half, even, first, last, most) if draft.uneven else (half, even)
    failure = bench.differs(draft.graph, exact, shares)
    if failure is None or failure.stack:
        return failure
    for kind in sorted(draft.guessed):
        paths = [path for path, of in draft.places.items() if of == kind]
        groups = tuple(group for group in exact if any(_touches(group, path) for path in paths))
        if groups and (found := bench.differs(draft.graph, groups, shares)):
            return replace(found, stack=found.stack or (paths[0],))
    return replace(failure, stack=tuple(path for path, of in draft.places.items() if of in draft.guessed))


def _decide(decisions: Decisions, draft: Draft, failure: Failure, model: nn.Module) -> None:
    """Meet the sizes of the failing module's type in the next way; without any, hold the channels it touches."""
    own = failure.stack[0] if failure.stack else ""
    candidates = [own] if not _is_torch(model, own) else list(failure.stack)
    for path in candidates:
        kind = draft.places.get(path)
        if kind is not None and decisions.choices.get(kind, Choice.AS_IS) is not Choice.FROZEN:
            decisions.choices[kind] = Choice(decisions.choices.get(kind, Choice.AS_IS) + 1)
            return
    for path in failure.stack:
        touched = any(_touches(group, path) for group in draft.graph.prunable_groups)
        if touched and path not in decisions.held:
            decisions.held[path] = f"has a size that is fixed in the Python code around {path!r} ({failure.message})"
            # What its own sizes allow may be different once its inputs stay.
            decisions.choices.pop(draft.places.get(path, ""), None)
            return
        if touched and path not in decisions.held_whole:
            decisions.held_whole.add(path)
            return
    decisions.held[""] = f"cannot be removed: the smaller model fails ({failure.message})"
    decisions.held_whole.add("")


def _is_torch(model: nn.Module, path: str) -> bool:
    return type(model.get_submodule(path)).__module__.startswith("torch.nn.")


def _touches(group: Group, path: str) -> bool:
    """Whether a module, or one inside it, holds a slice of the group."""
    return any(not path or part.tensor.startswith(f"{path}.") for part in group.slices)
