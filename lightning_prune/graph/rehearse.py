"""Which smaller models are tried out before anyone relies on a graph: sizes in Python code show only when it runs.

After the constraints are resolved the model is run once more with about half of the channels of every group gone
(`lightning_prune.graph.trial_runs`). A failure names the module; the sizes fixed in modules of its type are then met
in another way, or their channels are left as they are. Where the layout of channels was read off one run (views,
chunks), other shares of them go too, and results are compared, since a wrong guess need not fail.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor, nn

from lightning_prune.graph.build_groups import Classes
from lightning_prune.graph.channel_graph import ChannelGraph, SizeAttribute
from lightning_prune.graph.constraints import GroupedConvolution, Split, kind_of
from lightning_prune.graph.entry_points import EntryPoint
from lightning_prune.graph.groups import Group
from lightning_prune.graph.resolve import ONE_SIZE, Choice
from lightning_prune.graph.sizes import is_torch
from lightning_prune.graph.trial import Failure, Ran
from lightning_prune.graph.trial_runs import TrialRuns
from lightning_prune.model_state.attention import NarrowMultiheadAttention


@cache
def _half(size: int) -> Tensor:
    """About half of so many channels, the same at every call."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(size))[: size // 2].sort().values


SHARES: dict[str, Callable[[int, int], Tensor]] = {  # of a group's position and size: which channels go
    "half": lambda _, size: _half(size),
    "first": lambda _, size: torch.arange(min(1, size)),  # what is left rarely divides as it did
    "last": lambda _, size: torch.tensor([size - 1]),  # of uneven pieces another one shrinks
    "most": lambda _, size: torch.arange(size - 1),
    "even": lambda position, size: _half(size if position % 2 == 0 else 0),  # neighbours no longer shrink alike
    "odd": lambda position, size: _half(size if position % 2 else 0),
}


#: Its layout is no guess: heads of any width, whatever the input's.
KNOWN = kind_of(NarrowMultiheadAttention)


@dataclass
class Decisions:
    """What the trials came to."""

    choices: dict[str, Choice] = field(default_factory=dict)  # per module type, how the sizes in its code are met
    held: dict[str, str] = field(default_factory=dict)  # per module path, why channels that it reads stay
    held_whole: set[str] = field(default_factory=set)  # those of which the channels that they make stay too
    sized: set[str] = field(default_factory=set)  # module types and paths that failed at another size only
    suspects: dict[str, frozenset[int]] = field(default_factory=dict)  # per type, numbers that its code computed with
    counted: set[tuple[str, int]] = field(default_factory=set)  # types, with a number of channels that has to stay
    differs: bool = False  # something failed at another size only
    spared: set[str] = field(default_factory=set)  # module types whose sizes were frozen once, and did not help
    left: set[str] = field(default_factory=set)  # paths of modules whose sizes stay, though others of their type go
    cleared: set[str] = field(default_factory=set)  # types that were suspected of a failure elsewhere for nothing
    failed: Counter[str] = field(default_factory=Counter)  # module paths, how often they did under another choice

    def advance(self, kind: str, path: str, proposal: Proposal, model: nn.Module) -> None:
        """Try the next choice for a type.

        Once the layouts are through, modules built as the one that fails most are left alone and the others begin
        anew; if none of them gets on, channels whose number the code computes with are; then all go on together.
        """
        self.failed[path] += 1
        choice = Choice(self.choices.get(kind, Choice.AS_IS) + 1)
        if choice is Choice.INPUTS:
            paths = [other for other, of in proposal.places.items() if of == kind and other not in self.left]
            worst = max(paths, key=lambda other: self.failed[other])
            alike = {other for other in paths if _build(model, other) == _build(model, worst)}
            if len(alike) < len(paths):
                self.left |= alike
                choice = Choice.AS_IS
            else:
                self.left -= {other for other, of in proposal.kinds.items() if of == kind}
                suspects = {(kind, n) for n in self.suspects.get(kind, ())} - self.counted
                self.counted |= suspects
                choice = Choice.AS_IS if suspects else choice
            for other in paths:
                del self.failed[other]
        self.choices[kind] = choice


@dataclass(frozen=True)
class Proposal:
    """A graph under certain decisions, and what is still only a guess in it."""

    graph: ChannelGraph
    places: dict[str, str]  # module paths whose code holds sizes of prunable channels, with the module's type
    guessed: set[str]  # types whose layout was read off one run, so that results have to be compared
    kinds: Mapping[str, str]  # module paths whose widths were noted, with the module's type
    unread: Callable[[], tuple[SizeAttribute, ...]]  # attributes that may count pieces, though no run has read them
    uneven: bool = False  # some channels are cut into pieces of different sizes


def places_of(classes: Classes, choices: Mapping[str, Choice]) -> tuple[dict[str, str], set[str]]:
    """Where sizes of channels that may go were met, and the module types whose layouts are guesses."""
    places: dict[str, str] = {}
    guessed: set[str] = set()
    for constraint in classes.space.constraints:
        if isinstance(constraint, GroupedConvolution) or constraint.exact or not constraint.site.stack:
            continue
        if constraint.site.kind == KNOWN or not classes.may_go(constraint.distinct):
            continue
        kind = places[constraint.site.stack[0]] = constraint.site.kind
        choice = choices.get(kind, Choice.AS_IS)
        if isinstance(constraint, Split) or constraint.ids.dim() > 1 or choice.repairs or choice.replaces_code:
            guessed.add(kind)
    return places, guessed


def _build(model: nn.Module, path: str) -> list[torch.Size]:
    return [tensor.shape for tensor in model.get_submodule(path).parameters()]


def settle(
    model: nn.Module, ran: Sequence[Ran], propose: Callable[[Decisions], Proposal]
) -> tuple[ChannelGraph, frozenset[str], list[EntryPoint]]:
    """The graph whose channels can be removed without the model's code breaking; types whose layout had to stay.

    And if any failed at another size than the traced one, the forward at that size.
    ``propose`` returns the same object if decisions come to the same.
    """
    decisions = Decisions()
    runs = TrialRuns(model, ran)
    current = propose(decisions)
    while current.graph.prunable_groups and (failure := _failing(runs, current)):
        before = current
        while current is before:  # some choices come to the same
            _decide(decisions, current, failure, model)
            current = propose(decisions)
    stuck = {kind for kind, choice in decisions.choices.items() if choice >= Choice.INPUTS}
    return _with_unread(runs, current).graph, frozenset(stuck), runs.other_sizes if decisions.differs else []


def _with_unread(runs: TrialRuns, proposal: Proposal) -> Proposal:
    """Attributes that no run has read follow too, if that changes nothing of what runs."""
    more = proposal.unread()
    if not more:
        return proposal
    graph = replace(proposal.graph, sizes=(*proposal.graph.sizes, *more))
    removed = _removed(graph.prunable_groups, "half")
    changes = runs.failure(graph, removed) or runs.failure(graph, removed, beyond_forward=True)
    return (
        proposal if changes or not runs.runs_alike(proposal.graph, graph, removed) else replace(proposal, graph=graph)
    )


def _first(found: Iterable[Failure | None]) -> Failure | None:
    return next((failure for failure in found if failure is not None), None)


def _failing(runs: TrialRuns, proposal: Proposal) -> Failure | None:
    """The first thing that goes wrong with fewer channels."""
    groups = proposal.graph.prunable_groups
    shares = SHARES if proposal.guessed else ("half",)
    failure = _first(runs.failure(proposal.graph, _removed(groups, share)) for share in shares)
    if failure is None and proposal.guessed:
        failure = _differing(runs, proposal)
    return failure or runs.failure(proposal.graph, _removed(groups, "half"), beyond_forward=True)


def _differing(runs: TrialRuns, proposal: Proposal) -> Failure | None:
    """A module type whose channels, removed alone, change the results; None if all together do not."""
    shares = ("half", "even", "first") if proposal.uneven else ("half", "even")

    def difference(groups: Sequence[Group]) -> Failure | None:
        found = (runs.difference(proposal.graph, _removed(groups, share), varied=share == "half") for share in shares)
        return _first(found)

    exact = [group for group in proposal.graph.prunable_groups if group.statistics is None]
    failure = difference(exact)
    if failure is None or failure.stack:
        return failure
    for kind in sorted(proposal.guessed) if len(proposal.guessed) > 1 else ():
        paths = [path for path, of in proposal.places.items() if of == kind]
        groups = [group for group in exact if any(_touches(group, path) for path in paths)]
        if groups and (found := difference(groups)):
            return replace(found, stack=found.stack or (paths[0],))
    return replace(failure, stack=tuple(path for path, of in proposal.places.items() if of in proposal.guessed))


def _removed(groups: Sequence[Group], share: str) -> dict[str, Tensor]:
    return {group.name: SHARES[share](position, group.size) for position, group in enumerate(groups)}


def _decide(decisions: Decisions, proposal: Proposal, failure: Failure, model: nn.Module) -> None:
    """Meet the sizes of the failing module's type in the next way; without any, hold the channels it touches."""
    own = failure.stack[:1] or ("",)
    decisions.differs |= failure.other_size
    for path in failure.stack if is_torch(model.get_submodule(own[0])) else own:
        kind = proposal.places.get(path)
        if kind is not None:
            (decisions.sized.add if failure.other_size else decisions.sized.discard)(kind)
        if kind is not None and decisions.choices.get(kind, Choice.AS_IS) is not Choice.FROZEN:
            if failure.counts:
                decisions.suspects.setdefault(kind, failure.counts)
            decisions.advance(kind, path, proposal, model)
            return
    if not failure.other_size and (
        _lay_out(decisions, proposal, failure) or _follow_widths(decisions, proposal, failure)
    ):
        return
    for path in failure.stack:
        touched = any(_touches(group, path) for group in proposal.graph.prunable_groups)
        if touched and path not in decisions.held:
            why = ONE_SIZE if failure.other_size else "has a size that is fixed in the Python code"
            decisions.held[path] = f"{why} around {path!r} ({failure.message})"
            decisions.sized |= {path} if failure.other_size else set()
            # What its own sizes allow may be different once its inputs stay.
            decisions.choices.pop(proposal.places.get(path, ""), None)
            # What follows widths, or stays, did not help: a number that is equal by chance (of a layer) is left alone.
            for kind in {
                proposal.kinds[place] for place in failure.stack if place in proposal.kinds
            } - decisions.spared:
                choice = decisions.choices.get(kind, Choice.AS_IS)
                if choice is Choice.FROZEN or choice.follows_widths:
                    del decisions.choices[kind]
                    decisions.spared.add(kind)
            return
        if touched and path not in decisions.held_whole:
            decisions.held_whole.add(path)
            return
    decisions.sized |= {""} if failure.other_size else set()
    decisions.held[""] = f"cannot be removed: the smaller model fails ({failure.message})"
    decisions.held_whole.add("")


def _lay_out(decisions: Decisions, proposal: Proposal, failure: Failure) -> bool:
    """Whether the channels that failed here may have been laid out elsewhere: ``view(n, -1, heads, width)`` runs."""
    if not failure.message.startswith("RuntimeError"):
        return False  # an assertion speaks of the code that makes it
    touched = [group for group in proposal.graph.prunable_groups if _touches(group, failure.stack[0])]
    parents = (layer.name.rpartition(".")[0] for group in touched for layer in group.layers)
    for kind in (proposal.places[parent] for parent in parents if parent in proposal.places):
        choice = decisions.choices.get(kind, Choice.AS_IS)
        if choice < Choice.OTHER_AXIS_CODE and kind not in decisions.cleared:
            decisions.choices[kind] = Choice(choice + 1)
            return True
        if choice is Choice.OTHER_AXIS_CODE:
            decisions.choices[kind] = Choice.AS_IS
            decisions.cleared.add(kind)
    return False


def _follow_widths(decisions: Decisions, proposal: Proposal, failure: Failure) -> bool:
    """Whether attributes of the module, or of its caller, may have to follow what enters or leaves it."""
    for kind in [proposal.kinds[path] for path in failure.stack if path in proposal.kinds][:2]:
        choice = decisions.choices.get(kind, Choice.AS_IS)
        if kind in decisions.cleared:
            continue
        if choice < Choice.WIDTHS:
            decisions.choices[kind] = Choice(max(choice + 1, Choice.INPUTS))
            return True
        if choice is Choice.WIDTHS:  # in vain, or for the worse: a list of numbers that are no widths
            decisions.choices[kind] = Choice.AS_IS
            decisions.cleared.add(kind)
            return True
    return False


def _touches(group: Group, path: str) -> bool:
    """Whether a module, or one inside it, holds a slice of the group."""
    return any(not path or part.tensor.startswith(f"{path}.") for part in group.slices)
